"""The evolutionary algorithm: starts, moves and selection."""
