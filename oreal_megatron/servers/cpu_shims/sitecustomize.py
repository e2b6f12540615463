"""Defines operators that torchvision misses on CPU, at the start of every process of an SGLang server on CPU.

server_process.py puts this directory on the path. PyPI's torchvision wheel has compiled operators for CUDA, which do
not load with a CPU torch; its Python side then registers shapes for the missing `nms` and `qnms`, and its import fails.
This module defines both before torchvision is imported; nothing calls them. With a CUDA torch it does nothing.
"""

import importlib.abc
import sys
from typing import Any


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    library: Any = None

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == "torchvision" and self.library is None:
            import torch

            self.library = torch.library.Library("torchvision", "FRAGMENT")
            if torch.version.cuda is None:
                for operator in ("nms", "qnms"):
                    self.library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


sys.meta_path.insert(0, _BeforeTorchvision())
