"""The rectangles of a plan, point to point: straight out of the trainer's parameters, straight into the servers'.

Senders and receivers are one process group of their own (senders first). Each pair moves its rectangles in halves of a
bucket; pairs take turns so that in every round each process has one partner, and nobody waits for a third. Memory
beyond the weights is one bucket a process: one half travels while the other is packed or unpacked.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from oreal_megatron.conversion.rules import Box
from oreal_megatron.weight_sync.planner import TransferOp, buckets


@dataclass(frozen=True)
class Rendezvous:
    """Where the processes of one group meet: the trainer's first rank listens there."""

    host: str
    port: int
    name: str
    """Of this group: another one for every set of servers that joins."""
    num_senders: int
    num_receivers: int
    timeout_seconds: float

    @property
    def size(self) -> int:
        return self.num_senders + self.num_receivers


def join(rendezvous: Rendezvous, rank: int, backend: str) -> Any:
    """The process group of a meeting, apart from any default group. rank: senders first, then receivers.

    Raises:
        RuntimeError: somebody did not come within the timeout.
    """
    timeout = timedelta(seconds=rendezvous.timeout_seconds)
    # Whoever hosts the store keeps it alive in its reference; the others connect.
    store = dist.TCPStore(rendezvous.host, rendezvous.port, is_master=False, timeout=timeout)
    prefixed = dist.PrefixStore(f"resharding/{rendezvous.name}", store)
    if backend == "nccl":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return dist.ProcessGroupNCCL(prefixed, rank, rendezvous.size, options)
    return dist.ProcessGroupGloo(prefixed, rank, rendezvous.size, timeout)


def rounds(pairs: Iterable[tuple[int, int]], num_senders: int, num_receivers: int) -> list[tuple[int, int]]:
    """(sender, receiver) pairs in the order in which they move.

    Round k pairs sender s with receiver s + k (modulo the larger side): one partner each. All processes keep the
    rounds' order, so the earliest pair that is not done can always go on: no circle of waiting.
    """
    size = max(num_senders, num_receivers)
    return sorted(pairs, key=lambda pair: ((pair[1] - pair[0]) % size, pair))


class Sender:
    """One trainer rank's side of a publication."""

    def __init__(
        self,
        group: Any,
        rank: int,
        num_senders: int,
        plan: Mapping[int, Sequence[TransferOp]],
        num_receivers: int,
        *,
        dtype: torch.dtype,
        bucket_bytes: int,
    ):
        """plan: by receiver number. dtype: of the servers' weights; others are cast while a bucket is packed."""
        self._group = group
        self._offset = num_senders
        self._dtype = dtype
        half = _Buffers.elements(bucket_bytes, dtype)
        order = rounds(((rank, receiver) for receiver in plan), num_senders, num_receivers)
        self._buckets = [(receiver, run) for _, receiver in order for run in buckets(plan[receiver], half)]
        self._buffers = _Buffers(run for _, run in self._buckets)

    def send(self, shards: Mapping[str, Tensor]) -> None:
        """Sends everything that the plan asks of this rank.

        shards: this rank's tensors by Megatron's name, of any float dtype.
        """
        travelling: list[Any] = []
        for receiver, run in self._buckets:
            if len(travelling) == _Buffers.NUMBER:
                travelling.pop(0).wait()
            flat = self._buffers.next(run, self._dtype, next(iter(shards.values())).device)
            pack(run, shards, flat)
            travelling.append(self._group.send([flat], self._offset + receiver, 0))
        for work in travelling:
            work.wait()


class Receiver:
    """One server rank's side of a publication."""

    def __init__(
        self,
        group: Any,
        number: int,
        num_receivers: int,
        plan: Mapping[int, Sequence[TransferOp]],
        num_senders: int,
        *,
        dtype: torch.dtype,
        bucket_bytes: int,
    ):
        """plan: by sender."""
        self._group = group
        self._dtype = dtype
        half = _Buffers.elements(bucket_bytes, dtype)
        order = rounds(((sender, number) for sender in plan), num_senders, num_receivers)
        self._buckets = [(sender, run) for sender, _ in order for run in buckets(plan[sender], half)]
        self._buffers = _Buffers(run for _, run in self._buckets)

    @property
    def rectangles(self) -> Iterator[TransferOp]:
        """All that this rank receives."""
        return (item for _, run in self._buckets for item in run)

    def receive(self, parameters: Mapping[str, Tensor]) -> None:
        """Receives everything that the plan gives this rank, into `parameters` by SGLang's name."""
        coming: list[tuple[Any, Sequence[TransferOp], Tensor]] = []
        for sender, run in self._buckets:
            flat = self._buffers.next(run, self._dtype, parameters[run[0].target].device)
            coming.append((self._group.recv([flat], sender, 0), run, flat))
            if len(coming) == _Buffers.NUMBER:
                self._unpack(*coming.pop(0), parameters)
        for item in coming:
            self._unpack(*item, parameters)

    def _unpack(self, work: Any, run: Sequence[TransferOp], flat: Tensor, parameters: Mapping[str, Tensor]) -> None:
        work.wait()
        unpack(run, flat, parameters)


class _Buffers:
    """The halves of a bucket, taken in turns."""

    NUMBER = 2

    @classmethod
    def elements(cls, bucket_bytes: int, dtype: torch.dtype) -> int:
        """That move together, where no single row is longer."""
        return max(bucket_bytes // cls.NUMBER // dtype.itemsize, 1)

    def __init__(self, runs: Iterable[Sequence[TransferOp]]):
        self._num_elements = max((sum(item.num_elements for item in run) for run in runs), default=0)
        self._buffers: list[Tensor] = []
        self._turn = 0

    def next(self, run: Sequence[TransferOp], dtype: torch.dtype, device: torch.device) -> Tensor:
        while len(self._buffers) < self.NUMBER:
            self._buffers.append(torch.empty(self._num_elements, dtype=dtype, device=device))
        self._turn = (self._turn + 1) % self.NUMBER
        return self._buffers[self._turn][: sum(item.num_elements for item in run)]


def pack(run: Sequence[TransferOp], shards: Mapping[str, Tensor], flat: Tensor) -> None:
    """Fills a flat buffer with a bucket's rectangles out of a trainer rank's tensors."""
    for item, part in _parts(run, flat):
        part.copy_(view(shards[item.source], item.source_box))


def unpack(run: Sequence[TransferOp], flat: Tensor, parameters: Mapping[str, Tensor]) -> None:
    """Copies a bucket's rectangles to where they belong in a receiver's tensors."""
    for item, part in _parts(run, flat):
        view(parameters[item.target], item.target_box).copy_(part)


def _parts(run: Sequence[TransferOp], flat: Tensor) -> Iterator[tuple[TransferOp, Tensor]]:
    """Each rectangle of a bucket with its place in the flat buffer."""
    first = 0
    for item in run:
        yield item, flat[first : first + item.num_elements].view(item.target_box.shape)
        first += item.num_elements


def view(tensor: Tensor, box: Box) -> Tensor:
    """A rectangle of a tensor."""
    rows = tensor.detach()[slice(*box.rows)]
    return rows if box.columns is None else rows[:, slice(*box.columns)]
