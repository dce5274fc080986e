"""A run as a whole: its settings, the slice that each stage depends on, and the code that each stage runs."""
