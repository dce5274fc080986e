"""A search in several processes."""
