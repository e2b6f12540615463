"""The IPC transport: servers on the trainer's machines copy their own bytes out of memory that trainer ranks share.

Every server rank has a collector: a trainer rank on the same machine, on the same GPU where they are colocated. NCCL
does not allow two processes of one GPU in a communicator, so trainer ranks reshard among themselves: the collector
gathers a server rank's next bucket and passes it on as a handle in the command. Two buckets alternate: servers copy one
while the next is gathered.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import IO

import torch
import torch.distributed as dist

from oreal_megatron.distributed.cpu_backend import device
from oreal_megatron.weight_sync.commands import CommandChannel, EncodedCommand
from oreal_megatron.weight_sync.p2p import pack
from oreal_megatron.weight_sync.planner import ReshardingPlan, TransferOp, buckets, num_elements, ops_by_sender
from oreal_megatron.weight_sync.source import PolicyShards
from oreal_megatron.weight_sync.types import PausedServer, TransferFailure, TransferResult
from oreal_megatron.weight_sync.worker import Unpack

_NUM_BUFFERS = 2
_MEMORY = "/dev/shm"


@dataclass(frozen=True)
class _IpcBucket:
    """The next elements for a receiver, from one trainer rank or several."""

    receiver: int
    collector: int
    """Trainer rank that gathers the bucket and passes it on."""
    parts: tuple[tuple[int, tuple[TransferOp, ...]], ...]
    """(trainer rank, its ops), in the order in which they lie in the bucket."""

    @property
    def ops(self) -> tuple[TransferOp, ...]:
        return tuple(op for _, ops in self.parts for op in ops)


def collector(server_rank: int, num_senders: int) -> int:
    """Returns the trainer rank that collects for a server rank, which is numbered over all servers of the run.

    Both are numbered alike over devices that they share.
    """
    return server_rank % num_senders


class IpcTransport:
    """See Transport."""

    def __init__(self, shards: PolicyShards, plan: ReshardingPlan, channel: CommandChannel, *, bucket_bytes: int):
        self._shards = shards
        self._groups = shards.groups
        self._plan = plan
        self._channel = channel
        self._bucket_elements = max(bucket_bytes // shards.dtype.itemsize, 1)
        self._indices: tuple[int, ...] = ()
        """Indices of the servers that `_rounds` is for."""
        self._rounds: list[list[_IpcBucket]] = []
        """Rounds with a bucket for each receiver; the last buckets of a receiver may be empty."""

    def prepare(self, weight_version: int) -> None:
        """Does nothing: weights are sent from where they are."""

    def send(self, servers: Sequence[PausedServer]) -> TransferResult:
        """See Transport."""
        start = time.perf_counter()
        indices: tuple[int, ...] = self._groups.from_main(tuple(server.index for server in servers))
        if not indices:
            return TransferResult()
        if self._indices != indices:
            self._indices, self._rounds = indices, self._planned_rounds(indices)
        planned = time.perf_counter()
        failures: dict[str, TransferFailure] = {}
        in_flight: list[tuple[dict[str, Future[None]], list[_SharedBuffer]]] = []
        load_seconds = 0.0
        for number, buckets_of_round in enumerate(self._rounds):
            if len(in_flight) == _NUM_BUFFERS:
                waiting = time.perf_counter()
                failures |= self._new_failures(in_flight[0][0], failures)
                in_flight.pop(0)  # frees the buckets, which the servers have copied
                load_seconds += time.perf_counter() - waiting
            commands, shared = self._collect(buckets_of_round, is_first=number == 0)
            in_flight.append((self._send_commands(servers, commands, failures), shared))
        waiting = time.perf_counter()
        for answers, _ in in_flight:
            failures |= self._new_failures(answers, failures)
        load_seconds += time.perf_counter() - waiting
        return TransferResult(
            failures=failures,
            num_bytes=len(indices) * self._plan.num_elements * self._shards.dtype.itemsize,
            seconds={
                "plan": planned - start,
                "transfer": time.perf_counter() - planned - load_seconds,
                "load": load_seconds,
            },
        )

    def _planned_rounds(self, indices: tuple[int, ...]) -> list[list[_IpcBucket]]:
        tensor, num_senders = self._plan.tensor, self._plan.num_senders
        collectors = {
            number * tensor + rank: collector(index * tensor + rank, num_senders)
            for number, index in enumerate(indices)
            for rank in range(tensor)
        }
        assignment = self._plan.assign(len(indices), same_device=collectors)
        queues = {to: list(self._runs(ops_by_sender(assignment, to), rank)) for to, rank in collectors.items()}
        return [
            [
                _IpcBucket(receiver, collectors[receiver], queue[number] if number < len(queue) else ())
                for receiver, queue in queues.items()
            ]
            for number in range(max(len(queue) for queue in queues.values()))
        ]

    def _runs(
        self, by_sender: Mapping[int, Sequence[TransferOp]], collector: int
    ) -> Iterator[tuple[tuple[int, tuple[TransferOp, ...]], ...]]:
        """Yields the parts of each of a receiver's buckets, with the ops of one sender or more.

        The collector's own ops come first, then other senders' by their distance from the collector, so that no two
        receivers take from the same sender at the same time where there are as many of both.
        """
        current: list[tuple[int, tuple[TransferOp, ...]]] = []
        room = self._bucket_elements
        for sender in sorted(by_sender, key=lambda rank: (rank - collector) % self._plan.num_senders):
            for run in buckets(by_sender[sender], self._bucket_elements):
                size = num_elements(run)
                if size > room and current:
                    yield tuple(current)
                    room, current = self._bucket_elements, []
                current.append((sender, run))
                room -= size
        if current:
            yield tuple(current)

    def _collect(
        self, buckets_of_round: Sequence[_IpcBucket], *, is_first: bool
    ) -> tuple[dict[int, EncodedCommand], list[_SharedBuffer]]:
        """Gathers the buckets that this rank passes on, and sends what other ranks need for theirs.

        Returns:
            (commands by receiver, shared memory that must live until they are executed).
        """
        rank, tensors, dtype = self._groups.rank, self._shards.tensors(), self._shards.dtype
        transfers: list[dist.P2POp] = []
        shared: dict[int, _SharedBuffer] = {}
        for tag, bucket in enumerate(buckets_of_round):
            buffer, first = None, 0
            if bucket.collector == rank:
                shared[bucket.receiver] = buffer = _SharedBuffer(num_elements(bucket.ops), dtype)
            for sender, ops in bucket.parts:
                size = num_elements(ops)
                if buffer is not None:
                    part = buffer.tensor[first : first + size]
                    first += size
                elif sender == rank:
                    part = torch.empty(size, dtype=dtype, device=device())
                else:
                    continue
                if sender == rank:
                    pack(ops, tensors, part)
                if buffer is None:
                    transfers.append(dist.P2POp(dist.isend, part, bucket.collector, tag=tag))
                elif sender != rank:
                    transfers.append(dist.P2POp(dist.irecv, part, sender, tag=tag))
        # As one batch: with NCCL, two ranks that send to each other would wait for each other.
        for work in dist.batch_isend_irecv(transfers) if transfers else ():
            work.wait()
        commands = {}
        for bucket in buckets_of_round:
            if bucket.collector == rank:
                buffer = shared[bucket.receiver]
                task = Unpack(bucket.ops, is_first, buffer.file)
                commands[bucket.receiver] = self._channel.encode(
                    task, bucket.receiver % self._plan.tensor, bucket=None if buffer.file is not None else buffer.tensor
                )
        return commands, list(shared.values())

    def _send_commands(
        self,
        servers: Sequence[PausedServer],
        commands: dict[int, EncodedCommand],
        failures: Mapping[str, TransferFailure],
    ) -> dict[str, Future[None]]:
        """Sends all ranks' commands. Returns the answers by server name; none on other ranks than the main rank."""
        by_receiver: dict[int, EncodedCommand] = {}
        for part in self._groups.gather_over_world([commands]):
            by_receiver |= part[0]
        tensor = self._plan.tensor
        return {
            server.name: self._channel.send(server, [by_receiver[number * tensor + rank] for rank in range(tensor)])
            for number, server in enumerate(servers)
            if self._groups.is_main and server.name not in failures
        }

    def _new_failures(
        self, answers: Mapping[str, Future[None]], known: Mapping[str, TransferFailure]
    ) -> dict[str, TransferFailure]:
        """Waits for answers; returns failures by server name, the known ones too, on every rank."""
        found = {
            name: failure for name, answer in answers.items() if (failure := self._channel.failure(answer)) is not None
        }
        return self._groups.from_main({**found, **known})

    def close(self) -> None:
        """Does nothing: no resources are kept between publications."""


class _SharedBuffer:
    """Memory that a worker reads from: on a GPU by CUDA's own handles, on a CPU by a file in memory."""

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
        """Path of the file; None on a GPU, where the tensor itself goes with the command."""
        return self._file.name if self._file is not None else None
