"""Offloads weights and optimizer states to host memory while they are not used."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class _OffloadedStorage:
    storage: torch.UntypedStorage
    host: Tensor
    """Bytes of the storage, uint8; pinned if there is a GPU."""


class HostOffload:
    """Tensors that are on the device inside `on_device()` and in host memory otherwise.

    Storages are emptied and filled again, so that every view of them stays valid: Megatron-Core's flat buffers, and
    parameters that an optimizer shares with the model. (Megatron-Core's own `offload_to_cpu` of an optimizer replaces
    parameters by new tensors that the model does not hold.) On a CPU the same copies go from host memory to host
    memory, which saves nothing and lets tests run there.
    """

    def __init__(self, tensors: Callable[[], Iterable[Tensor]], *, enabled: bool):
        """enabled: False leaves the tensors where they are."""
        self._tensors = tensors
        self._enabled = enabled
        self._offloaded: list[_OffloadedStorage] = []
        self._users = 0

    @contextlib.contextmanager
    def on_device(self) -> Iterator[None]:
        """Onloads the tensors for the block, and offloads them when the outermost block ends."""
        self._users += 1
        self._onload()
        try:
            yield
        finally:
            self._users -= 1
            self.offload()

    def offload(self) -> None:
        """Moves the tensors to host memory, unless an `on_device` block is open."""
        if not self._enabled or self._users or self._offloaded:
            return
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in self._tensors() if t.numel()}
        for storage in storages.values():
            bytes_there = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
            pinned = storage.device.type == "cuda"
            host = torch.empty(storage.nbytes(), dtype=torch.uint8, device="cpu", pin_memory=pinned)
            # Waits for the copy before the storage is freed.
            host.copy_(bytes_there)
            self._offloaded.append(_OffloadedStorage(storage, host))
            storage.resize_(0)

    def _onload(self) -> None:
        for offloaded in self._offloaded:
            offloaded.storage.resize_(offloaded.host.numel())
            torch.empty(0, dtype=torch.uint8, device=offloaded.storage.device).set_(offloaded.storage).copy_(
                offloaded.host
            )
        self._offloaded = []


class FrozenModel(HostOffload):
    """A model that is not trained, such as the reference."""

    def __init__(self, module: torch.nn.Module, *, offload: bool):
        super().__init__(module.parameters, enabled=offload)
        self.module = module.requires_grad_(False)
