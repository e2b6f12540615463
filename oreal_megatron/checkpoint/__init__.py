"""Checkpoints of a run: atomic, checked, retained and exported."""
