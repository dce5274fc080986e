"""Shared by all tests; this folder is on the import path, so tests may import the modules in it.

Models here are so small that threads only get in each other's way, so each process gets one, those that tests start
included.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"
