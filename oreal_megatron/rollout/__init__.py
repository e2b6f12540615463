"""Prompts to rollouts: the sampler, and the engines that generate for it."""
