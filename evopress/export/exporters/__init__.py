"""Ways to write a compressed model, one file each."""
