"""Stands in for Transformer Engine 2.11 where there is no CUDA, for tests in processes of their own.

Only what Megatron-Core's wrappers take from it, by the same names, arguments and parameter names, computed by torch:
so the wrappers, the layer spec, their checkpoints and our way through them run for real. It says nothing of kernels.
"""

from transformer_engine import common as common
from transformer_engine import pytorch as pytorch

__version__ = "2.11.0"
