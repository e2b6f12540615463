"""Checkpoints of a run: atomic, retained, resumable."""
