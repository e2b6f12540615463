"""The IPC transport: servers on the trainer's machine take their own bytes out of memory that trainer ranks share.

Every server rank has a trainer rank beside it, on its GPU where they are colocated. Trainer ranks reshard among
themselves: the one beside collects a server rank's next bucket, and hands it over as a handle in the order. Two buckets
alternate: servers copy one while the next is collected.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.reduction import ForkingPickler

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

from oreal_megatron.parallel.device import device
from oreal_megatron.resharding.delivery import Delivery, Failure, PausedServer
from oreal_megatron.resharding.loader import Unpack
from oreal_megatron.resharding.orders import Desk, Given, NamedTensors, Written, failure_of
from oreal_megatron.resharding.plan import Receiver, Rectangle, buckets, plan_resharding
from oreal_megatron.resharding.served import EngineLayout
from oreal_megatron.resharding.shards import PolicyShards
from oreal_megatron.resharding.transport import pack

_NUM_BUFFERS = 2


@dataclass(frozen=True)
class _Bucket:
    """What one server rank gets next."""

    receiver: Receiver
    beside: int
    """The trainer rank that hands it over."""
    parts: tuple[tuple[int, tuple[Rectangle, ...]], ...]
    """(sender, its rectangles), in the order in which they lie in the bucket."""

    @property
    def rectangles(self) -> tuple[Rectangle, ...]:
        return tuple(item for _, items in self.parts for item in items)


class IpcTransport:
    """See Transport."""

    def __init__(self, shards: PolicyShards, layout: EngineLayout, desk: Desk, *, bucket_bytes: int):
        """layout: of each server; how many there are is known when sending."""
        self._shards = shards
        self._groups = shards.groups
        self._layout = replace(layout, count=0)
        self._desk = desk
        self._bucket_elements = max(bucket_bytes // shards.dtype.itemsize, 1)
        self._rounds: list[list[_Bucket]] = []
        self._num_elements = 0

    def prepare(self, weight_version: int) -> None:
        """Nothing: weights leave from where they are."""

    def send(self, servers: Sequence[PausedServer]) -> Delivery:
        """See Transport."""
        begun = time.perf_counter()
        num_servers: int = self._groups.from_main(len(servers))
        if not num_servers:
            return Delivery()
        self._plan(num_servers)
        planned = time.perf_counter()
        failures: dict[str, Failure] = {}
        given: list[dict[str, Given]] = []
        kept: list[list[object]] = []
        load_seconds = 0.0
        for number, one_round in enumerate(self._rounds):
            if len(given) == _NUM_BUFFERS:
                waiting = time.perf_counter()
                failures |= self._answered(given.pop(0), failures)
                kept.pop(0)
                load_seconds += time.perf_counter() - waiting
            written, alive = self._collected(one_round, is_first=number == 0)
            kept.append(alive)
            given.append(self._given(servers, written, failures))
        waiting = time.perf_counter()
        for one in given:
            failures |= self._answered(one, failures)
        load_seconds += time.perf_counter() - waiting
        return Delivery(
            failures=failures,
            num_bytes=self._num_elements * self._shards.dtype.itemsize,
            seconds={
                "plan": planned - begun,
                "transfer": time.perf_counter() - planned - load_seconds,
                "load": load_seconds,
            },
        )

    def _plan(self, num_servers: int) -> None:
        """Rounds, in each of which every server rank gets a bucket, the last ones perhaps an empty one."""
        if self._layout.count == num_servers:
            return
        shards = self._shards
        self._layout = replace(self._layout, count=num_servers)
        receivers = [Receiver(e, r) for e in range(num_servers) for r in range(self._layout.tensor)]
        beside = {receiver: number % shards.trainer.num_ranks for number, receiver in enumerate(receivers)}
        plan = plan_resharding(shards.table, shards.geometry, shards.trainer, self._layout, same_device=beside)
        self._num_elements = plan.num_elements
        queues = {receiver: list(self._runs(plan.of_receiver(receiver))) for receiver in receivers}
        self._rounds = [
            [
                _Bucket(receiver, beside[receiver], queue[number] if number < len(queue) else ())
                for receiver, queue in queues.items()
            ]
            for number in range(max(len(queue) for queue in queues.values()))
        ]

    def _runs(
        self, by_sender: Mapping[int, Sequence[Rectangle]]
    ) -> Iterator[tuple[tuple[int, tuple[Rectangle, ...]], ...]]:
        """A receiver's rectangles in buckets, each with those of one sender or more."""
        room, current = self._bucket_elements, []
        for sender, items in by_sender.items():
            for run in buckets(items, self._bucket_elements):
                size = sum(item.num_elements for item in run)
                if size > room and current:
                    yield tuple(current)
                    room, current = self._bucket_elements, []
                current.append((sender, run))
                room -= size
        if current:
            yield tuple(current)

    def _collected(
        self, one_round: Sequence[_Bucket], *, is_first: bool
    ) -> tuple[dict[Receiver, Written], list[object]]:
        """(orders, what must live until they are carried out), of the buckets that this rank hands over."""
        rank, tensors, dtype = self._groups.rank, self._shards.tensors(), self._shards.dtype
        arriving, flats = [], {}
        for tag, bucket in enumerate(one_round):
            if bucket.beside != rank:
                continue
            size = sum(item.num_elements for item in bucket.rectangles)
            flats[bucket.receiver] = flat = torch.empty(size, dtype=dtype, device=device())
            first = 0
            for sender, items in bucket.parts:
                part = flat[first : first + sum(item.num_elements for item in items)]
                first += part.numel()
                if sender == rank:
                    pack(items, tensors, part)
                else:
                    arriving.append(dist.irecv(part, sender, tag=tag))
        for tag, bucket in enumerate(one_round):
            for sender, items in bucket.parts:
                if sender == rank and bucket.beside != rank:
                    part = torch.empty(sum(item.num_elements for item in items), dtype=dtype, device=device())
                    pack(items, tensors, part)
                    dist.send(part, bucket.beside, tag=tag)
        for work in arriving:
            work.wait()
        written, alive = {}, []
        for bucket in one_round:
            if bucket.beside == rank:
                task = Unpack(bucket.rectangles, is_first)
                pickled = _Shared(flats[bucket.receiver])
                written[bucket.receiver] = self._desk.write(task, bucket.receiver.rank, pickled)
                alive.append(pickled)
        return written, alive

    def _given(
        self, servers: Sequence[PausedServer], written: dict[Receiver, Written], failures: Mapping[str, Failure]
    ) -> dict[str, Given]:
        """Server -> its workers' orders; empty on other ranks than the main one."""
        orders = {to: order for part in self._groups.gather_over_world([written]) for to, order in part[0].items()}
        return {
            server.name: self._desk.give(server, [orders[Receiver(e, r)] for r in range(self._layout.tensor)])
            for e, server in enumerate(servers)
            if self._groups.is_main and server.name not in failures
        }

    def _answered(self, given: Mapping[str, Given], known: Mapping[str, Failure]) -> dict[str, Failure]:
        """What failed, on every rank."""
        found = {name: failure for name, one in given.items() if (failure := failure_of(self._desk, one)) is not None}
        return self._groups.from_main({**found, **known})

    def close(self) -> None:
        """Nothing is left between publications."""


class _Shared:
    """Pickles an order with a buffer that stays where it is; keeps all of it alive."""

    def __init__(self, buffer: Tensor):
        self._tensors: NamedTensors = [("bucket", buffer)] if buffer.numel() else []

    def __call__(self, order: NamedTensors) -> bytes:
        self._tensors = [*((name, tensor.clone()) for name, tensor in order), *self._tensors]
        stream = io.BytesIO()
        # Of torch's ways to share CPU memory the only one that works between processes that do not know each other.
        before = torch.multiprocessing.get_sharing_strategy()
        torch.multiprocessing.set_sharing_strategy("file_system")
        try:
            ForkingPickler(stream).dump(self._tensors)
        finally:
            torch.multiprocessing.set_sharing_strategy(before)
        return stream.getvalue()
