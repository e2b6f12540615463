"""Prompts in, packed token batches out."""
