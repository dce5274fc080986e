"""Settings: one pydantic model per stage, so that a stage's code depends on its own section only."""
