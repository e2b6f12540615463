"""Environment variables that the libraries below torch read (no torch)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

NCCL_WITHOUT_CUMEM = ("NCCL_CUMEM_ENABLE", "0")
"""Variable and value that SGLang sets. With another value on one side, NCCL cannot open the memory of a process of the
same machine, and a direct publication fails. A value that is set already holds for both sides."""

NO_DEVICES = {"CUDA_VISIBLE_DEVICES": ""}
"""Variable and value with which CUDA, and so torch, finds no GPU. CUDA reads the variable once, at its first call."""


@contextlib.contextmanager
def devices_hidden(*, when: bool = True) -> Iterator[None]:
    """Hides GPUs in the block from this process and from processes that it starts, where `when` is true.

    `resources.device=cpu` is a CPU on every machine by this alone: code and libraries ask torch for a GPU, and find
    none. Enter it before torch, or anything that imports torch, has asked for a device: the answer stays.
    """
    if not when:
        yield
        return
    before = {name: os.environ.pop(name) for name in NO_DEVICES if name in os.environ}
    os.environ.update(NO_DEVICES)
    try:
        yield
    finally:
        for name in NO_DEVICES:
            os.environ.pop(name, None)
        os.environ.update(before)
