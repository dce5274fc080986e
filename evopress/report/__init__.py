"""The comparison of all models of a run: one HTML page and a table for the terminal."""
