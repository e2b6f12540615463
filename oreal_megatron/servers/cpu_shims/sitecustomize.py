"""Python imports this at start in every process of an SGLang server on CPU (server_process.py puts it on the path).

The torchvision wheel on PyPI brings compiled operators for CUDA, which do not load beside a CPU torch; its Python side
then registers shapes for `nms` and `qnms`, which nobody has defined, and its import fails. So they are defined just
before; nothing calls them. Without effect beside a CUDA torch.
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
