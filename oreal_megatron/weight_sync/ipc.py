"""The IPC transport: servers on the trainer's machines take their own bytes out of memory that trainer ranks share.

Every server rank has a trainer rank beside it, on its GPU where they are colocated; NCCL lets no two processes of one
GPU into a communicator. So trainer ranks reshard among themselves: the one beside collects a server rank's next bucket,
and hands it over as a handle in the order. Two buckets alternate: servers copy one while the next is collected.
"""

from __future__ import annotations

import io
import pickle
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import IO, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

from oreal_megatron.distributed.cpu_backend import device
from oreal_megatron.weight_sync.commands import CommandChannel, EncodedCommand, NamedTensors, PendingCommand, failure_of
from oreal_megatron.weight_sync.p2p import pack
from oreal_megatron.weight_sync.planner import ServerRank, TransferOp, buckets, plan_resharding
from oreal_megatron.weight_sync.sglang_layout import SGLangLayout
from oreal_megatron.weight_sync.source import PolicyShards
from oreal_megatron.weight_sync.types import PausedServer, TransferFailure, TransferResult
from oreal_megatron.weight_sync.worker import Unpack

_NUM_BUFFERS = 2
_MEMORY = "/dev/shm"


@dataclass(frozen=True)
class _IpcBucket:
    """What one server rank gets next."""

    receiver: ServerRank
    beside: int
    """The trainer rank that hands it over."""
    parts: tuple[tuple[int, tuple[TransferOp, ...]], ...]
    """(sender, its rectangles), in the order in which they lie in the bucket."""

    @property
    def rectangles(self) -> tuple[TransferOp, ...]:
        return tuple(item for _, items in self.parts for item in items)


class IpcTransport:
    """See Transport."""

    def __init__(self, shards: PolicyShards, layout: SGLangLayout, channel: CommandChannel, *, bucket_bytes: int):
        """layout: of each server; how many there are is known when sending."""
        self._shards = shards
        self._groups = shards.groups
        self._layout = layout
        self._indices: tuple[int, ...] = ()
        """Of the servers that the plan is for."""
        self._channel = channel
        self._bucket_elements = max(bucket_bytes // shards.dtype.itemsize, 1)
        self._rounds: list[list[_IpcBucket]] = []
        self._num_elements = 0

    def prepare(self, weight_version: int) -> None:
        """Nothing: weights leave from where they are."""

    def send(self, servers: Sequence[PausedServer]) -> TransferResult:
        """See Transport."""
        start = time.perf_counter()
        indices: tuple[int, ...] = self._groups.from_main(tuple(server.index for server in servers))
        if not indices:
            return TransferResult()
        self._plan(indices)
        planned = time.perf_counter()
        failures: dict[str, TransferFailure] = {}
        pending: list[dict[str, PendingCommand]] = []
        kept: list[list[_SharedBuffer]] = []
        load_seconds = 0.0
        for number, one_round in enumerate(self._rounds):
            if len(pending) == _NUM_BUFFERS:
                waiting = time.perf_counter()
                failures |= self._answered(pending.pop(0), failures)
                kept.pop(0)
                load_seconds += time.perf_counter() - waiting
            encoded, alive = self._collected(one_round, is_first=number == 0)
            kept.append(alive)
            pending.append(self._send_commands(servers, encoded, failures))
        waiting = time.perf_counter()
        for one in pending:
            failures |= self._answered(one, failures)
        load_seconds += time.perf_counter() - waiting
        return TransferResult(
            failures=failures,
            num_bytes=self._num_elements * self._shards.dtype.itemsize,
            seconds={
                "plan": planned - start,
                "transfer": time.perf_counter() - planned - load_seconds,
                "load": load_seconds,
            },
        )

    def _plan(self, indices: tuple[int, ...]) -> None:
        """Rounds, in each of which every server rank gets a bucket, the last ones perhaps an empty one."""
        if self._indices == indices:
            return
        shards, tensor = self._shards, self._layout.tensor
        self._indices = indices
        # Server ranks and trainer ranks are numbered alike over the devices that they share.
        beside = {
            ServerRank(number, rank): (index * tensor + rank) % shards.trainer.num_ranks
            for number, index in enumerate(indices)
            for rank in range(tensor)
        }
        layout = replace(self._layout, count=len(indices))
        plan = plan_resharding(shards.table, shards.geometry, shards.trainer, layout, same_device=beside)
        self._num_elements = plan.num_elements
        queues = {to: list(self._runs(plan.of_receiver(to), rank)) for to, rank in beside.items()}
        self._rounds = [
            [
                _IpcBucket(receiver, beside[receiver], queue[number] if number < len(queue) else ())
                for receiver, queue in queues.items()
            ]
            for number in range(max(len(queue) for queue in queues.values()))
        ]

    def _runs(
        self, by_sender: Mapping[int, Sequence[TransferOp]], beside: int
    ) -> Iterator[tuple[tuple[int, tuple[TransferOp, ...]], ...]]:
        """A receiver's rectangles in buckets, each with those of one sender or more.

        First what the rank beside has itself, then by distance from it: so that no two receivers ask the same sender at
        the same time, where there are as many of both.
        """
        current: list[tuple[int, tuple[TransferOp, ...]]] = []
        room = self._bucket_elements
        for sender in sorted(by_sender, key=lambda rank: (rank - beside) % self._shards.trainer.num_ranks):
            for run in buckets(by_sender[sender], self._bucket_elements):
                size = sum(item.num_elements for item in run)
                if size > room and current:
                    yield tuple(current)
                    room, current = self._bucket_elements, []
                current.append((sender, run))
                room -= size
        if current:
            yield tuple(current)

    def _collected(
        self, one_round: Sequence[_IpcBucket], *, is_first: bool
    ) -> tuple[dict[ServerRank, EncodedCommand], list[_SharedBuffer]]:
        """(orders, what must live until they are carried out), of the buckets that this rank hands over."""
        rank, tensors, dtype = self._groups.rank, self._shards.tensors(), self._shards.dtype
        moves: list[dist.P2POp] = []
        held: dict[ServerRank, _SharedBuffer] = {}
        for tag, bucket in enumerate(one_round):
            buffer, first = None, 0
            if bucket.beside == rank:
                size = sum(item.num_elements for item in bucket.rectangles)
                held[bucket.receiver] = buffer = _SharedBuffer(size, dtype)
            for sender, items in bucket.parts:
                size = sum(item.num_elements for item in items)
                if buffer is not None:
                    part = buffer.tensor[first : first + size]
                    first += size
                elif sender == rank:
                    part = torch.empty(size, dtype=dtype, device=device())
                else:
                    continue
                if sender == rank:
                    pack(items, tensors, part)
                if buffer is None:
                    moves.append(dist.P2POp(dist.isend, part, bucket.beside, tag=tag))
                elif sender != rank:
                    moves.append(dist.P2POp(dist.irecv, part, sender, tag=tag))
        # As one batch: NCCL would have two ranks that owe each other something wait for each other.
        for work in dist.batch_isend_irecv(moves) if moves else ():
            work.wait()
        encoded = {}
        for bucket in one_round:
            if bucket.beside == rank:
                buffer = held[bucket.receiver]
                task = Unpack(bucket.rectangles, is_first, buffer.file)
                pickled = pickle.dumps if buffer.file is not None else buffer.pickled
                encoded[bucket.receiver] = self._channel.encode(task, bucket.receiver.rank, pickled)
        return encoded, list(held.values())

    def _send_commands(
        self,
        servers: Sequence[PausedServer],
        encoded: dict[ServerRank, EncodedCommand],
        failures: Mapping[str, TransferFailure],
    ) -> dict[str, PendingCommand]:
        """Server -> its workers' orders; empty on other ranks than the main one."""
        commands = {
            to: command for part in self._groups.gather_over_world([encoded]) for to, command in part[0].items()
        }
        return {
            server.name: self._channel.send(server, [commands[ServerRank(e, r)] for r in range(self._layout.tensor)])
            for e, server in enumerate(servers)
            if self._groups.is_main and server.name not in failures
        }

    def _answered(
        self, pending: Mapping[str, PendingCommand], known: Mapping[str, TransferFailure]
    ) -> dict[str, TransferFailure]:
        """What failed, on every rank."""
        found = {
            name: failure for name, one in pending.items() if (failure := failure_of(self._channel, one)) is not None
        }
        return self._groups.from_main({**found, **known})

    def close(self) -> None:
        """Nothing is left between publications."""


class _SharedBuffer:
    """Memory that a worker reads out of: of a GPU by CUDA's own handles, elsewhere by a file in memory."""

    def __init__(self, num_elements: int, dtype: torch.dtype):
        self._file: IO[bytes] | None = None
        if device().type == "cpu":
            # Not torch's sharing of CPU tensors: it starts a process that outlives this one.
            self._file = tempfile.NamedTemporaryFile(dir=_MEMORY, prefix="oreal-")  # noqa: SIM115 (gone with the buffer)
            self.tensor = torch.from_file(self._file.name, shared=True, size=max(num_elements, 1), dtype=dtype)
        else:
            self.tensor = torch.empty(num_elements, dtype=dtype, device=device())

    @property
    def file(self) -> str | None:
        """None: the tensor itself goes along with the order."""
        return self._file.name if self._file is not None else None

    def pickled(self, command: NamedTensors) -> bytes:
        """An order with what belongs to it."""
        stream = io.BytesIO()
        _HandlePickler(stream).dump([*command, ("bucket", self.tensor)])
        return stream.getvalue()


class _HandlePickler(pickle.Pickler):
    """Tensors on a GPU as CUDA's handles, others whole: torch's own pickler would start a server for these."""

    def reducer_override(self, value: Any) -> Any:
        return reduce_tensor(value) if isinstance(value, Tensor) and value.is_cuda else NotImplemented
