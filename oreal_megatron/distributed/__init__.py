"""Layout arithmetic, process groups and the device seam: the only importer of Megatron's parallel_state."""
