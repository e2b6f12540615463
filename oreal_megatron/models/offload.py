"""What is on the device, and when: weights and optimizer states that are there only while they are used."""

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
    """uint8, pinned where there is a device."""


class HostOffload:
    """Tensors whose bytes are on the device inside `on_device()`, and in host memory once they have been parked.

    Their storages are emptied and filled again, so that every view of them stays what it is: Megatron-Core's flat
    buffers, and parameters that an optimizer shares with the model. (Megatron-Core's own `offload_to_cpu` of an
    optimizer puts new tensors in the place of parameters, which then are not the model's any more.)
    On a CPU the same moves go from host memory to host memory: they save nothing there, and can be tested.
    """

    def __init__(self, tensors: Callable[[], Iterable[Tensor]], *, enabled: bool):
        """enabled: false makes everything stay where it is."""
        self._tensors = tensors
        self._enabled = enabled
        self._offloaded: list[_OffloadedStorage] = []
        self._users = 0

    @contextlib.contextmanager
    def on_device(self) -> Iterator[None]:
        """Brings the tensors, and parks them when the last user is done."""
        self._users += 1
        self._onload()
        try:
            yield
        finally:
            self._users -= 1
            self.offload()

    def offload(self) -> None:
        """To host memory, unless somebody is using the tensors."""
        if not self._enabled or self._users or self._offloaded:
            return
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in self._tensors() if t.numel()}
        for storage in storages.values():
            bytes_there = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
            pinned = storage.device.type == "cuda"
            host = torch.empty(storage.nbytes(), dtype=torch.uint8, device="cpu", pin_memory=pinned)
            # Waits for the copy: after it the storage is somebody else's.
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

    @property
    def bytes_on_device(self) -> int:
        """Of the storages behind the tensors."""
        storages = [tensor.untyped_storage() for tensor in self._tensors()]
        return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


class FrozenModel(HostOffload):
    """A model that is not trained: the reference."""

    def __init__(self, module: torch.nn.Module, *, offload: bool):
        super().__init__(module.parameters, enabled=offload)
        self.module = module.requires_grad_(False)
