"""Offloads weights and optimizer states to host memory while they are not used."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor


class HostOffload:
    """Tensors that are on the device inside `on_device()`, and in host memory after `offload()`.

    Their storages are emptied and filled again, so that all views stay valid: Megatron-Core's flat buffers, and
    parameters that an optimizer shares with the model. Megatron-Core's own `offload_to_cpu` of an optimizer replaces
    parameters by new tensors, which the model does not share.

    On a CPU the same copies go from host memory to host memory. They save no memory there, but run in tests.
    """

    def __init__(self, tensors: Callable[[], Iterable[Tensor]], *, enabled: bool):
        """Moves nothing yet.

        Args:
            tensors: returns the tensors; called at every offload.
            enabled: False leaves the tensors on the device.
        """
        self._tensors = tensors
        self._enabled = enabled
        # Empty storages, and their bytes in host memory (uint8, pinned where the device is a GPU).
        self._offloaded: list[tuple[torch.UntypedStorage, Tensor]] = []
        self._num_users = 0

    @contextlib.contextmanager
    def on_device(self) -> Iterator[None]:
        """Holds the tensors on the device in the block, and offloads them after the outermost block."""
        self._num_users += 1
        self._onload()
        try:
            yield
        finally:
            self._num_users -= 1
            self.offload()

    def offload(self) -> None:
        """Moves the tensors to host memory, unless they are in use."""
        if not self._enabled or self._num_users or self._offloaded:
            return
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in self._tensors() if t.numel()}
        for storage in storages.values():
            pinned = storage.device.type == "cuda"
            host = torch.empty(storage.nbytes(), dtype=torch.uint8, device="cpu", pin_memory=pinned)
            # This waits for the copy, since the storage is freed next.
            host.copy_(_bytes_of(storage))
            self._offloaded.append((storage, host))
            storage.resize_(0)

    def _onload(self) -> None:
        for storage, host in self._offloaded:
            storage.resize_(host.numel())
            _bytes_of(storage).copy_(host)
        self._offloaded = []


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


class FrozenModel(HostOffload):
    """A model that is not trained, such as the reference, and the offloading of its weights."""

    def __init__(self, module: torch.nn.Module, *, offload: bool):
        """Freezes `module`; offload: whether the layout offloads."""
        super().__init__(module.parameters, enabled=offload)
        self.module = module.requires_grad_(False)
