"""Ways to turn variants into a configuration."""
