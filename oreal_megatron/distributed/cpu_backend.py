"""The CPU backend: runs the published Megatron-Core on CPUs over gloo, where there is no CUDA device.

Megatron-Core assumes CUDA in device literals, in calls of torch.cuda and in the state of its random generators, and has
no switch for that. Inside `cpu_backend()` all three are redirected to the CPU. On a machine with CUDA it does nothing.
Besides fake_groups.py, no other code in the package replaces functions of libraries.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")


def device() -> torch.device:
    """Returns the device of this process's models and batches."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else _CPU


def collective_backend() -> str:
    """Returns the torch.distributed backend for `device()`: nccl or gloo."""
    return "nccl" if torch.cuda.is_available() else "gloo"


def reset_peak_memory() -> None:
    """Starts a new measurement for `peak_memory`."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int | None:
    """Returns the largest number of bytes since `reset_peak_memory`, allocated on the GPU or resident in host memory.

    None where the system does not report it.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    return None


def free_cached_memory() -> None:
    """Returns the device memory that torch caches to the driver, for other processes."""
    if torch.cuda.is_available():
        torch.cuda.ipc_collect()  # blocks shared with another process that has released them
        torch.cuda.empty_cache()


def _names_cuda(value: Any) -> bool:
    if isinstance(value, torch.device):
        return value.type == "cuda"
    if isinstance(value, str):
        return value.startswith("cuda")
    return isinstance(value, int) and not isinstance(value, bool)


_TAKE_DEVICE_OR_TYPE = frozenset((torch.Tensor.cuda, torch.Tensor.type, torch.Tensor.to))
"""Functions that take a device in a positional argument, or return the name of a type with the device in it."""


class _CudaMeansCpu(TorchFunctionMode):
    """Rewrites CUDA device literals in torch calls to the CPU."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not kwargs and func not in _TAKE_DEVICE_OR_TYPE:
            return func(*args)
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        # DDP and the optimizers group parameters by type() and accept the names 'torch.cuda.*Tensor' only.
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if func is torch.Tensor.to and len(args) > 1 and _names_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        if "device" in kwargs and _names_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": _CPU}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        return func(*args, **kwargs)


class _NoStream:
    """Replaces torch.cuda.Stream on a CPU, where all operations run in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event: Any = None) -> None: ...


def _nothing() -> Callable[..., None]:
    # A new function for every name: torch._dynamo indexes torch's functions by identity and refuses duplicates.
    return lambda *args, **kwargs: None


@contextlib.contextmanager
def cpu_backend() -> Iterator[None]:
    """Redirects CUDA to the CPU in the block; enter it once, around everything that uses Megatron-Core.

    Every torch call takes about 1.4 us longer on a CPU. With CUDA there is no cost.
    """
    if torch.cuda.is_available():
        yield
        return
    from megatron.core.tensor_parallel import random as megatron_random

    def get_rng_state(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        torch.set_rng_state(state)

    replacements = {
        "current_device": lambda: _CPU,  # used as a `device=` argument
        "synchronize": _nothing(),
        "set_device": _nothing(),
        "empty_cache": _nothing(),
        "Stream": _NoStream,
        "current_stream": lambda *args: _NoStream(),
        "default_stream": lambda *args: _NoStream(),
        "stream": lambda stream: contextlib.nullcontext(),
        "manual_seed": lambda seed: torch.manual_seed(seed),
        "get_rng_state": get_rng_state,
    }
    with contextlib.ExitStack() as stack:
        for name, replacement in replacements.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, replacement))
        stack.enter_context(mock.patch.object(torch.cuda.random, "get_rng_state", get_rng_state))
        # Megatron-Core's RNG tracker sets the state of the device's generator with this function.
        stack.enter_context(mock.patch.object(megatron_random, "_set_cuda_rng_state", set_rng_state))
        stack.enter_context(_CudaMeansCpu())
        yield
