"""Search for the best level of every unit under a budget."""
