"""Hugging Face checkpoints to Megatron-Core modules."""
