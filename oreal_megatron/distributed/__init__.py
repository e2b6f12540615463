"""Process groups, context parallelism and the CPU backend; the only importer of Megatron's parallel_state."""
