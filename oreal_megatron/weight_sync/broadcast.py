"""The broadcast transport: whole tensors to every server rank, by SGLang's own means; the peers' way.

Each pipeline stage has a source, its first rank, which gathers the stage's tensors bucket by bucket and broadcasts them
in a group with all workers of all servers. The main rank tells the servers over HTTP what comes, bucket by bucket.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import Backend, PrefixStore, _new_process_group_helper, _world

from oreal_megatron.distributed.cpu_backend import collective_backend, device
from oreal_megatron.weight_sync.commands import CommandChannel
from oreal_megatron.weight_sync.p2p import pack, unpack
from oreal_megatron.weight_sync.planner import TransferOp, plan_gathering
from oreal_megatron.weight_sync.source import PolicyShards
from oreal_megatron.weight_sync.types import PausedServer, TransferFailure, TransferResult, failure_of_answer


@dataclass(frozen=True)
class _BroadcastBucket:
    """Whole tensors that one source gathers and broadcasts together."""

    source: int
    """A trainer rank."""
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    parts: Mapping[int, Sequence[TransferOp]]
    """By trainer rank: what it has of them."""

    @property
    def num_elements(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.shapes)


class BroadcastTransport:
    """See Transport."""

    def __init__(self, shards: PolicyShards, channel: CommandChannel, *, bucket_bytes: int):
        self._shards = shards
        self._groups = shards.groups
        self._channel = channel
        self._buckets = _buckets(shards, max(bucket_bytes // shards.dtype.itemsize, 1))
        self._sources = tuple(dict.fromkeys(bucket.source for bucket in self._buckets))
        self._joined: dict[int, Any] = {}
        """By source: its group, on that rank alone."""
        self._names: dict[int, str] = {}
        self._server_names: tuple[str, ...] = ()

    def prepare(self, weight_version: int) -> None:
        """Nothing: weights leave from where they are."""

    def send(self, servers: Sequence[PausedServer]) -> TransferResult:
        """See Transport. A process that ends in the middle breaks the groups: then no server has the weights."""
        start = time.perf_counter()
        server_names: tuple[str, ...] = self._groups.from_main(tuple(server.name for server in servers))
        if not server_names:
            return TransferResult()
        failures: dict[str, TransferFailure] = {}
        if server_names != self._server_names:
            failures = self._join(servers, server_names)
        load_seconds = 0.0
        for bucket in self._buckets:
            if failures:
                break
            failures, seconds = self._move(bucket, servers)
            load_seconds += seconds
        if failures:
            self._leave(servers)
        num_ranks = len(server_names) * self._channel.tensor
        return TransferResult(
            failures=failures,
            num_bytes=num_ranks * self._shards.num_bytes,
            seconds={"transfer": time.perf_counter() - start - load_seconds, "load": load_seconds},
        )

    def _join(self, servers: Sequence[PausedServer], server_names: tuple[str, ...]) -> dict[str, TransferFailure]:
        """Makes a group for every source; the same answer on every rank."""
        self._leave(servers)
        size = 1 + len(server_names) * self._channel.tensor
        failures: dict[str, TransferFailure] = {}
        for source in self._sources:
            name: str = self._groups.from_main(f"weights-{uuid.uuid4().hex[:12]}")
            answers = {
                server.name: server.init_weights_update_group(
                    {
                        "master_address": self._channel.host,
                        "master_port": self._channel.port,
                        "rank_offset": 1 + number * self._channel.tensor,
                        "world_size": size,
                        "group_name": name,
                        "backend": collective_backend(),
                    }
                )
                for number, server in enumerate(servers)
                if self._groups.is_main
            }
            error = None
            self._names[source] = name
            if self._groups.rank == source:
                try:
                    self._joined[source] = self._group(name, size)
                except RuntimeError as failed:
                    error = f"trainer rank {source} could not join: {failed}"
            failures |= self._outcome(answers, error)
        self._server_names = server_names
        return failures

    def _group(self, name: str, size: int) -> Any:
        """The group as SGLang makes it on its side (`init_custom_process_group`), this rank being the first."""
        timeout = timedelta(seconds=self._channel.timeout_seconds)
        store = dist.TCPStore(self._channel.host, self._channel.port, is_master=False, timeout=timeout)
        options: dict[str, Any] = {"group_name": name, "timeout": timeout}
        group, _ = _new_process_group_helper(
            size, 0, [], Backend(collective_backend()), PrefixStore(name, store), **options
        )
        _world.pg_group_ranks[group] = {rank: rank for rank in range(size)}
        return group

    def _move(
        self, bucket: _BroadcastBucket, servers: Sequence[PausedServer]
    ) -> tuple[dict[str, TransferFailure], float]:
        """(what failed, seconds that servers took after the last byte)."""
        answers = {}
        if self._groups.is_main:
            dtype = self._channel.dtype
            request = {
                "names": list(bucket.names),
                "dtypes": [dtype] * len(bucket.names),
                "shapes": [list(shape) for shape in bucket.shapes],
                "group_name": self._names[bucket.source],
                "load_format": "flattened_bucket",
            }
            answers = {server.name: server.update_weights_from_distributed(request) for server in servers}
        whole, error = self._gathered(bucket), None
        if whole is not None:
            try:
                options = dist.BroadcastOptions()
                options.rootRank = 0
                self._joined[bucket.source].broadcast([whole.view(torch.uint8)], options).wait()
            except RuntimeError as failed:
                error = f"trainer rank {bucket.source}: {failed}"
        start = time.perf_counter()
        return self._outcome(answers, error), time.perf_counter() - start

    def _gathered(self, bucket: _BroadcastBucket) -> Tensor | None:
        """The bucket's tensors, one after the other, on its source."""
        rank, tensors = self._groups.rank, self._shards.tensors()
        mine = bucket.parts.get(rank, ())
        packed = torch.empty(sum(item.num_elements for item in mine), dtype=self._shards.dtype, device=device())
        pack(mine, tensors, packed)
        if rank != bucket.source:
            if mine:
                dist.send(packed, bucket.source)
            return None
        whole = torch.empty(bucket.num_elements, dtype=self._shards.dtype, device=device())
        targets, first = {}, 0
        for name, shape in zip(bucket.names, bucket.shapes, strict=True):
            size = torch.Size(shape).numel()
            targets[name] = whole[first : first + size].view(shape)
            first += size
        for sender, items in sorted(bucket.parts.items()):
            received = packed
            if sender != rank:
                received = torch.empty_like(whole[: sum(item.num_elements for item in items)])
                dist.recv(received, sender)
            unpack(items, received, targets)
        return whole

    def _outcome(self, answers: Mapping[str, Future[None]], error: str | None) -> dict[str, TransferFailure]:
        """By server, on every rank: what its answer says, or the error of a trainer rank."""
        errors = [text for part in self._groups.gather_over_world([error] if error else []) for text in part]
        if errors:
            self._drop()  # servers that wait for this rank hear at once that it is gone
        failures = {}
        for name, answer in answers.items():
            failure = failure_of_answer(answer) or (TransferFailure(errors[0]) if errors else None)
            if failure is not None:
                failures[name] = failure
        return self._groups.from_main(failures)

    def _leave(self, servers: Sequence[PausedServer]) -> None:
        """Forgets the groups on both sides; servers that are gone have none."""
        answers = [server.destroy_weights_update_group(name) for server in servers for name in self._names.values()]
        for answer in answers:
            failure_of_answer(answer)
        self._drop()
        self._names.clear()
        self._server_names = ()

    def _drop(self) -> None:
        """Leaves this rank's group."""
        for group in self._joined.values():
            dist.destroy_process_group(group)
        self._joined.clear()

    def close(self) -> None:
        """Leaves the groups."""
        self._leave(())


def _buckets(shards: PolicyShards, num_elements: int) -> list[_BroadcastBucket]:
    """Whole tensors in runs of at most `num_elements`, a larger one alone; none spans two sources."""
    trainer, table = shards.trainer, shards.table
    runs: list[tuple[int, list[str]]] = []
    room = 0
    parts = plan_gathering(table, shards.geometry, trainer)
    for name in parts:
        source = min(trainer.replicas(min(parts[name]) // (trainer.num_ranks // trainer.model.pipeline), 0))
        size = torch.Size(table.origins[name].shape).numel()
        if not runs or runs[-1][0] != source or size > room:
            runs.append((source, []))
            room = num_elements
        runs[-1][1].append(name)
        room -= size
    found = []
    for source, names in runs:
        by_rank: dict[int, list[TransferOp]] = {}
        for name in names:
            for rank, items in parts[name].items():
                by_rank.setdefault(rank, []).extend(items)
        found.append(
            _BroadcastBucket(source, tuple(names), tuple(table.origins[name].shape for name in names), by_rank)
        )
    return found
