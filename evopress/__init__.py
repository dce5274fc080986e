"""Optimal dynamic compression of language models by evolutionary search (EvoPress, arXiv 2410.14649)."""

__version__ = "0.1.0"
