"""What the method claims, measured: repeated searches compared, convergence, monotonicity."""
