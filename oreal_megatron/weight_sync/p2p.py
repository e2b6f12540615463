"""Transfer ops point to point: straight out of the trainer's parameters, straight into the servers'.

Senders and receivers are one process group of their own (senders first). Each pair moves its ops in halves of a bucket.
Pairs take turns so that in every round each process has one partner, and no process waits for a third. Memory beyond
the weights is one bucket a process: one half is transferred while the other is packed or unpacked.

A sender that keeps what it has sent can send changes alone (changes.py): each half is then preceded by the number of
its bytes, which is that of all elements where the changes are many. Memory beyond the weights and what was sent is two
and a half buckets then.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from oreal_megatron.conversion.rules import Box
from oreal_megatron.weight_sync.changes import apply_changes, decode_changes, encode_changes
from oreal_megatron.weight_sync.planner import TransferOp, buckets, num_elements

_NUM_HALVES = 2
_BLOCKING_WAIT = "TORCH_NCCL_BLOCKING_WAIT"


@dataclass(frozen=True)
class Rendezvous:
    """Address, name and size of a process group that trainer ranks and server ranks join."""

    host: str
    """Host of the trainer's main rank, whose store the processes use to find each other."""
    port: int
    name: str
    """Name of the group, different for every set of servers that joins."""
    num_senders: int
    num_receivers: int
    timeout_seconds: float

    @property
    def size(self) -> int:
        return self.num_senders + self.num_receivers


def nccl_version() -> str | None:
    """Returns the version of the NCCL that torch uses, such as 2.30.7; None if torch is built without NCCL."""
    return ".".join(map(str, torch.cuda.nccl.version())) if dist.is_nccl_available() else None


def join(rendezvous: Rendezvous, rank: int, backend: str) -> Any:
    """Joins the process group of a rendezvous, which is independent of the default group.

    rank: trainer ranks first, then receivers.

    Raises:
        RuntimeError: a process did not join within the timeout.
    """
    timeout = timedelta(seconds=rendezvous.timeout_seconds)
    # A client of the store: the main rank keeps the server alive by its own reference.
    store = dist.TCPStore(rendezvous.host, rendezvous.port, is_master=False, timeout=timeout)
    prefixed = dist.PrefixStore(f"resharding/{rendezvous.name}", store)
    if backend == "nccl":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        with waiting_on_host():
            return dist.ProcessGroupNCCL(prefixed, rank, rendezvous.size, options)
    return dist.ProcessGroupGloo(prefixed, rank, rendezvous.size, timeout)


@contextlib.contextmanager
def waiting_on_host() -> Iterator[None]:
    """Context in which NCCL groups are created whose `wait` returns once the transfer is over, or raises RuntimeError.

    A group that is created otherwise has a watchdog thread, which ends the process when a peer is lost, and its `wait`
    returns at once. Torch reads the variable when a group is created.
    """
    before = os.environ.get(_BLOCKING_WAIT)
    os.environ[_BLOCKING_WAIT] = "1"
    try:
        yield
    finally:
        del os.environ[_BLOCKING_WAIT]
        if before is not None:
            os.environ[_BLOCKING_WAIT] = before


def rounds(pairs: Iterable[tuple[int, int]], num_senders: int, num_receivers: int) -> list[tuple[int, int]]:
    """Returns (sender, receiver) pairs in the order in which they transfer.

    Round k pairs sender s with receiver s + k (modulo the larger side), so each process has one partner. All processes
    keep the rounds' order, so the earliest pair that is not done can always proceed: there is no deadlock.
    """
    size = max(num_senders, num_receivers)
    return sorted(pairs, key=lambda pair: ((pair[1] - pair[0]) % size, pair))


class Sender:
    """A trainer rank's side of a direct publication."""

    def __init__(
        self,
        group: Any,
        rendezvous: Rendezvous,
        rank: int,
        ops: Mapping[int, Sequence[TransferOp]],
        *,
        dtype: torch.dtype,
        bucket_bytes: int,
        keeps_sent: bool = False,
    ):
        """group: from `join`. ops: by receiver. dtype: dtype of the transfer; weights are cast while being packed.

        keeps_sent: whether to keep a copy of what was sent last, so that changes alone can be sent after it.
        """
        self._group = group
        self._offset = rendezvous.num_senders
        self._dtype = dtype
        pairs = rounds(((rank, to) for to in ops), rendezvous.num_senders, rendezvous.num_receivers)
        half = _half_elements(bucket_bytes, dtype)
        self._buckets = [(receiver, run) for _, receiver in pairs for run in buckets(ops[receiver], half)]
        self._halves: Iterator[Tensor] | None = None
        self._sent: dict[str, Tensor] | None = {} if keeps_sent else None
        """Copies of the tensors that were sent last, in the dtype of the transfer, by Megatron's name."""

    def send(self, shards: Mapping[str, Tensor], *, only_changes: bool = False) -> int:
        """Sends everything that is assigned to this rank; returns the number of bytes.

        shards: this rank's tensors by Megatron's name, of any float dtype.
        only_changes: send what differs from the last sending, to receivers that have it; the sender keeps what it
        sends.
        """
        num_bytes = 0
        in_flight: list[tuple[list[Any], list[Tensor]]] = []  # transfers, and what they read
        for receiver, run in self._buckets:
            if self._halves is None:
                self._halves = _halves(self._buckets, self._dtype, shards[run[0].source].device)
            if len(in_flight) == _NUM_HALVES:
                _wait_for(in_flight.pop(0)[0])
            flat = next(self._halves)[: num_elements(run)]
            pack(run, shards, flat)
            messages = self._changes(run, flat) if only_changes else [flat]
            num_bytes += sum(message.nbytes for message in messages)
            works = [self._group.send([message], self._offset + receiver, 0) for message in messages]
            in_flight.append((works, messages))
        for works, _ in in_flight:
            _wait_for(works)
        if self._sent is not None:
            for source in {op.source for _, run in self._buckets for op in run}:
                if source in self._sent:
                    self._sent[source].copy_(shards[source])
                else:
                    self._sent[source] = shards[source].to(self._dtype, copy=True)
        return num_bytes

    def _changes(self, run: Sequence[TransferOp], flat: Tensor) -> list[Tensor]:
        """Returns the messages for a half: the number of bytes that follow, int64 [1], and the half or its changes."""
        assert self._sent is not None
        before = torch.empty_like(flat)
        pack(run, self._sent, before)
        changes = encode_changes(before, flat)
        message = flat if changes is None else changes
        return [torch.tensor([message.nbytes], device=flat.device), message]

    def close(self) -> None:
        """Closes the connections, so that a receiver that waits for this rank fails at once."""
        self._group.abort()  # NCCL closes here,
        self._group = None  # gloo with the last reference


class Receiver:
    """A server rank's side of a direct publication."""

    def __init__(
        self,
        group: Any,
        rendezvous: Rendezvous,
        number: int,
        ops: Mapping[int, Sequence[TransferOp]],
        *,
        dtype: torch.dtype,
        bucket_bytes: int,
    ):
        """group: from `join`. number: this receiver's. ops: by sender. dtype: dtype of the transfer."""
        self.rendezvous = rendezvous
        self._group = group
        self._dtype = dtype
        pairs = rounds(((sender, number) for sender in ops), rendezvous.num_senders, rendezvous.num_receivers)
        half = _half_elements(bucket_bytes, dtype)
        self._buckets = [(sender, run) for sender, _ in pairs for run in buckets(ops[sender], half)]
        self._halves: Iterator[Tensor] | None = None

    @property
    def ops(self) -> Iterator[TransferOp]:
        """All transfer ops of this receiver."""
        return (op for _, run in self._buckets for op in run)

    def receive(
        self,
        parameters: Mapping[str, Tensor],
        arrived: Callable[[Sequence[TransferOp]], None],
        *,
        only_changes: bool = False,
    ) -> None:
        """Receives everything that is sent to this receiver into `parameters`, which are keyed by SGLang's name.

        arrived: called with the ops of every bucket after they were written, while the next bucket travels.
        only_changes: whether the sender sends changes alone.
        """
        in_flight: list[tuple[Any, Sequence[TransferOp], Tensor]] = []
        written: Sequence[TransferOp] = ()
        for sender, run in self._buckets:
            if self._halves is None:
                self._halves = _halves(self._buckets, self._dtype, parameters[run[0].target].device)
            flat = next(self._halves)[: num_elements(run)]
            if only_changes:
                count = torch.empty(1, dtype=torch.int64, device=flat.device)
                self._group.recv([count], sender, 0).wait()
                if (num_bytes := int(count)) < flat.nbytes:  # changes are sent where they are smaller
                    flat = torch.empty(num_bytes, dtype=torch.uint8, device=flat.device)
            in_flight.append((self._group.recv([flat], sender, 0), run, flat))
            arrived(written)
            written = ()
            if len(in_flight) == _NUM_HALVES:
                written = self._unpack(*in_flight.pop(0), parameters)
        arrived(written)
        for item in in_flight:
            arrived(self._unpack(*item, parameters))

    def close(self) -> None:
        """Closes the connections, so that a sender that waits for this receiver fails at once."""
        self._group.abort()  # NCCL closes here,
        self._group = None  # gloo with the last reference

    def _unpack(
        self, work: Any, run: Sequence[TransferOp], flat: Tensor, parameters: Mapping[str, Tensor]
    ) -> Sequence[TransferOp]:
        work.wait()
        if flat.dtype == torch.uint8:
            apply_changes(run, *decode_changes(flat, self._dtype), parameters)
        else:
            unpack(run, flat, parameters)
        return run


def _wait_for(works: Iterable[Any]) -> None:
    for work in works:
        work.wait()


def _half_elements(bucket_bytes: int, dtype: torch.dtype) -> int:
    return max(bucket_bytes // _NUM_HALVES // dtype.itemsize, 1)


def _halves(
    runs: Sequence[tuple[int, Sequence[TransferOp]]], dtype: torch.dtype, device: torch.device
) -> Iterator[Tensor]:
    """Allocates the halves of a bucket, each as large as the largest run, and yields them in turns."""
    size = max(num_elements(run) for _, run in runs)
    return itertools.cycle([torch.empty(size, dtype=dtype, device=device) for _ in range(_NUM_HALVES)])


def pack(run: Sequence[TransferOp], shards: Mapping[str, Tensor], flat: Tensor) -> None:
    """Fills a flat buffer with the elements of a bucket, out of a trainer rank's tensors."""
    for op, part in _parts(run, flat):
        part.copy_(view(shards[op.source], op.source_box))


def unpack(run: Sequence[TransferOp], flat: Tensor, parameters: Mapping[str, Tensor]) -> None:
    """Copies the elements of a bucket to their places in a receiver's tensors."""
    for op, part in _parts(run, flat):
        view(parameters[op.target], op.target_box).copy_(part)


def _parts(run: Sequence[TransferOp], flat: Tensor) -> Iterator[tuple[TransferOp, Tensor]]:
    """Yields each op of a bucket with its part of the flat buffer, in the shape of its rectangle."""
    first = 0
    for op in run:
        yield op, flat[first : first + op.num_elements].view(op.target_box.shape)
        first += op.num_elements


def view(tensor: Tensor, box: Box) -> Tensor:
    """Returns a rectangle of a tensor, as a view."""
    rows = tensor.detach()[slice(*box.rows)]
    return rows if box.columns is None else rows[:, slice(*box.columns)]
