"""What a run will need, worked out from its settings and the model's config before anything runs."""
