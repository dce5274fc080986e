"""A search in several processes: all run the same program, and each does its share of the evaluations."""
