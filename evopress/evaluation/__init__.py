"""How good a finished model is: perplexity, divergence from the dense model, and lm-eval tasks."""
