"""Policy, reference and token-level reward model on Megatron-Core, and the schedules that run them."""
