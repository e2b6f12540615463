"""What a GPU can do and what a machine has: FP8 recipes, a probe, the check of one against the other. No torch."""
