"""A GPU that torch sees and that nothing can be computed on, in every Python process with this directory on its path.

As CUDA does, it reads CUDA_VISIBLE_DEVICES when it is first asked for a device, and never again. An allocation on the
device raises, because torch is built without CUDA.
"""

from __future__ import annotations

import functools
import importlib.machinery
import os
import sys
from types import ModuleType
from typing import Any


@functools.cache
def num_devices() -> int:
    return 0 if os.environ.get("CUDA_VISIBLE_DEVICES") == "" else 1


def claim_device(torch: Any) -> None:
    torch.cuda.device_count = num_devices
    torch.cuda.is_available = lambda: bool(num_devices())
    torch.cuda.current_device = lambda: 0


class Finder(importlib.machinery.PathFinder):
    """Finds torch as always, and claims a device once it is imported."""

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: ModuleType | None = None) -> Any:
        spec = super().find_spec(name, path, target) if name == "torch" else None
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_claim(module: ModuleType) -> None:
                execute(module)
                claim_device(module)

            spec.loader.exec_module = execute_and_claim  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, Finder)
