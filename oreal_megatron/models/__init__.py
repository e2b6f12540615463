"""Policy, reference and token-level reward model on Megatron-Core, with their training, scoring and decoding."""
