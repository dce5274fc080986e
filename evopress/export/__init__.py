"""The final checkpoint of a configuration."""
