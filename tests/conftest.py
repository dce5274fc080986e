"""Shared by all tests; this folder is on the import path, so tests may import the modules in it."""
