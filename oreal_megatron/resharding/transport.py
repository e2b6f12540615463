"""The rectangles of a plan, point to point: straight out of the trainer's parameters, straight into the servers'.

Senders and receivers are one process group of their own (senders first). Each pair moves its rectangles in buckets;
pairs take turns so that in every round each process has one partner, and nobody waits for a third. Memory beyond the
weights is two buckets a process: one travels while the other is packed or unpacked.

Every element is audited end to end: the sum of its bits, weighted by its place in the receiver's tensor, is additive,
so what the senders expect and what the receivers hold are compared without gathering a tensor (64-bit, modulo 2^64).
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from oreal_megatron.convert.rules import Box
from oreal_megatron.resharding.plan import Rectangle, buckets

Checksums = dict[str, int]
"""By the receiver's name of a tensor: the weighted sum of its bits, in [0, 2^64)."""

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Multiplicative hashing: odd constants that spread neighbouring indices over 32 bits; two, so that a transpose shows.
_ROW, _COLUMN = 0x9E3779B1, 0x85EBCA6B

_CHUNK_ELEMENTS = 2**20  # a checksum takes 8 bytes an element while it is computed


@dataclass(frozen=True)
class Meeting:
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


def join(meeting: Meeting, rank: int, backend: str) -> Any:
    """The process group of a meeting, apart from any default group. rank: senders first, then receivers.

    Raises:
        RuntimeError: somebody did not come within the timeout.
    """
    timeout = timedelta(seconds=meeting.timeout_seconds)
    # Whoever hosts the store keeps it alive in its reference; the others connect.
    store = dist.TCPStore(meeting.host, meeting.port, is_master=False, timeout=timeout)
    prefixed = dist.PrefixStore(f"resharding/{meeting.name}", store)
    if backend == "nccl":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return dist.ProcessGroupNCCL(prefixed, rank, meeting.size, options)
    return dist.ProcessGroupGloo(prefixed, rank, meeting.size, timeout)


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
        plan: Mapping[int, Sequence[Rectangle]],
        num_receivers: int,
        *,
        dtype: torch.dtype,
        bucket_bytes: int,
    ):
        """plan: by receiver number. dtype: of the servers' weights; others are cast while a bucket is packed."""
        self._group = group
        self._offset = num_senders
        self._dtype = dtype
        per_bucket = max(bucket_bytes // dtype.itemsize, 1)
        order = rounds(((rank, receiver) for receiver in plan), num_senders, num_receivers)
        self._buckets = [(receiver, run) for _, receiver in order for run in buckets(plan[receiver], per_bucket)]
        self._buffers = _Buffers(run for _, run in self._buckets)

    def send(self, shards: Mapping[str, Tensor]) -> dict[int, Checksums]:
        """Sends everything that the plan asks of this rank; returns, by receiver, what the audit must find.

        shards: this rank's tensors by Megatron's name, of any float dtype.
        """
        expected: dict[int, Checksums] = defaultdict(lambda: defaultdict(int))
        travelling: list[Any] = []
        for receiver, run in self._buckets:
            if len(travelling) == _Buffers.NUMBER:
                travelling.pop(0).wait()
            flat = self._buffers.next(run, self._dtype, next(iter(shards.values())).device)
            for item, part in _parts(run, flat):
                part.copy_(_view(shards[item.source], item.source_box))
                sums = expected[receiver]
                sums[item.target] = _add(sums[item.target], checksum(part, item.target_box))
            travelling.append(self._group.send([flat], self._offset + receiver, 0))
        for work in travelling:
            work.wait()
        return {receiver: dict(sums) for receiver, sums in expected.items()}


class Receiver:
    """One server rank's side of a publication."""

    def __init__(
        self,
        group: Any,
        number: int,
        num_receivers: int,
        plan: Mapping[int, Sequence[Rectangle]],
        num_senders: int,
        *,
        dtype: torch.dtype,
        bucket_bytes: int,
    ):
        """plan: by sender."""
        self._group = group
        self._dtype = dtype
        self._boxes: dict[str, list[Box]] = defaultdict(list)
        for item in itertools.chain.from_iterable(plan.values()):
            self._boxes[item.target].append(item.target_box)
        per_bucket = max(bucket_bytes // dtype.itemsize, 1)
        order = rounds(((sender, number) for sender in plan), num_senders, num_receivers)
        self._buckets = [(sender, run) for sender, _ in order for run in buckets(plan[sender], per_bucket)]
        self._buffers = _Buffers(run for _, run in self._buckets)

    def receive(self, parameters: Mapping[str, Tensor]) -> None:
        """Receives everything that the plan gives this rank, into `parameters` by SGLang's name."""
        coming: list[tuple[Any, Sequence[Rectangle], Tensor]] = []
        for sender, run in self._buckets:
            flat = self._buffers.next(run, self._dtype, parameters[run[0].target].device)
            coming.append((self._group.recv([flat], sender, 0), run, flat))
            if len(coming) == _Buffers.NUMBER:
                self._unpack(*coming.pop(0), parameters)
        for item in coming:
            self._unpack(*item, parameters)

    def _unpack(self, work: Any, run: Sequence[Rectangle], flat: Tensor, parameters: Mapping[str, Tensor]) -> None:
        work.wait()
        for item, part in _parts(run, flat):
            _view(parameters[item.target], item.target_box).copy_(part)

    def audit(self, parameters: Mapping[str, Tensor]) -> Checksums:
        """What the parameters hold now, where something was sent to."""
        return {
            name: _add(*(checksum(_view(parameters[name], box), box) for box in boxes))
            for name, boxes in self._boxes.items()
        }


class _Buffers:
    """Two flat buffers, taken in turns."""

    NUMBER = 2

    def __init__(self, runs: Iterable[Sequence[Rectangle]]):
        self._num_elements = max((sum(item.num_elements for item in run) for run in runs), default=0)
        self._buffers: list[Tensor] = []
        self._turn = 0

    def next(self, run: Sequence[Rectangle], dtype: torch.dtype, device: torch.device) -> Tensor:
        while len(self._buffers) < self.NUMBER:
            self._buffers.append(torch.empty(self._num_elements, dtype=dtype, device=device))
        self._turn = (self._turn + 1) % self.NUMBER
        return self._buffers[self._turn][: sum(item.num_elements for item in run)]


def _parts(run: Sequence[Rectangle], flat: Tensor) -> Iterator[tuple[Rectangle, Tensor]]:
    """Each rectangle of a bucket with its place in the flat buffer."""
    first = 0
    for item in run:
        yield item, flat[first : first + item.num_elements].view(item.target_box.shape)
        first += item.num_elements


def _view(tensor: Tensor, box: Box) -> Tensor:
    rows = tensor.detach()[slice(*box.rows)]
    return rows if box.columns is None else rows[:, slice(*box.columns)]


def checksum(part: Tensor, box: Box) -> int:
    """The weighted sum of the bits of `part`, which lies at `box` of its tensor.

    Each element's bits times an odd weight of its row and one of its column: a wrong bit, a wrong place and a swap of
    two elements all change it.
    """
    columns = None if box.columns is None else _weights(box.columns, _COLUMN, part.device)
    rows = _weights(box.rows, _ROW, part.device)
    step = max(_CHUNK_ELEMENTS // max(part[:1].numel(), 1), 1)
    total = 0
    for chunk, weights in zip(part.split(step), rows.split(step), strict=True):
        bits = chunk.contiguous().view(_INTEGERS[chunk.element_size()]).long()
        if columns is not None:
            bits = (bits * columns).sum(-1)
        total += int((bits * weights).sum())
    return total % 2**64


def _weights(interval: tuple[int, int], multiplier: int, device: torch.device) -> Tensor:
    places = torch.arange(interval[0] + 1, interval[1] + 1, device=device)
    return (places * multiplier & 0xFFFFFFFF) | 1


def _add(*sums: int) -> int:
    return sum(sums) % 2**64
