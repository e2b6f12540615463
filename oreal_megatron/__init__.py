"""Outcome-reward reinforcement learning (OREAL) on Megatron-Core."""

__version__ = "0.1.0"
