"""The fitness engine: many candidates through the model together, block by block."""
