"""Configurations as text, in the two formats that are published with the paper."""
