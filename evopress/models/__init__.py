"""Loading models and running them block by block."""
