"""The broadcast transport: whole tensors to every server rank, by SGLang's /update_weights_from_distributed.

This is how most RL frameworks send weights. Each pipeline stage has a source, its first rank, which gathers the stage's
tensors bucket by bucket and broadcasts them in a group with all workers of all servers. The main rank announces each
bucket to the servers over HTTP.
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
from oreal_megatron.weight_sync.p2p import pack, unpack, waiting_on_host
from oreal_megatron.weight_sync.planner import TransferOp, num_elements, plan_gathering
from oreal_megatron.weight_sync.source import PolicyShards
from oreal_megatron.weight_sync.types import PausedServer, TransferFailure, TransferResult, failure_of_answer


@dataclass(frozen=True)
class _BroadcastBucket:
    """Whole tensors that a source gathers and broadcasts together."""

    source: int
    """Trainer rank that gathers and broadcasts."""
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    ops: Mapping[int, Sequence[TransferOp]]
    """Ops that gather the tensors, by the trainer rank that holds the elements."""

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
        self._own_groups: dict[int, Any] = {}
        """The process group of this rank, by source; only sources have one."""
        self._group_names: dict[int, str] = {}
        """Names of all groups, by source."""
        self._server_names: tuple[str, ...] = ()

    def prepare(self, weight_version: int) -> None:
        """Does nothing: weights are sent from where they are."""

    def send(self, servers: Sequence[PausedServer]) -> TransferResult:
        """See Transport. A process that ends during the transfer breaks the groups: then no server has the weights."""
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
            failures, seconds = self._broadcast(bucket, servers)
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
        """Sets up a group for every source; returns failures by server name, the same on every rank."""
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
            self._group_names[source] = name
            if self._groups.rank == source:
                try:
                    self._own_groups[source] = self._new_group(name, size)
                except RuntimeError as failed:
                    error = f"trainer rank {source} could not join: {failed}"
            failures |= self._failures(answers, error)
        self._server_names = server_names
        return failures

    def _new_group(self, name: str, size: int) -> Any:
        """Creates a group as SGLang does on its side (`init_custom_process_group`); this rank is rank 0 of it."""
        timeout = timedelta(seconds=self._channel.timeout_seconds)
        store = dist.TCPStore(self._channel.host, self._channel.port, is_master=False, timeout=timeout)
        options: dict[str, Any] = {"group_name": name, "timeout": timeout}
        with waiting_on_host():
            group, _ = _new_process_group_helper(
                size, 0, [], Backend(collective_backend()), PrefixStore(name, store), **options
            )
        _world.pg_group_ranks[group] = {rank: rank for rank in range(size)}
        return group

    def _broadcast(
        self, bucket: _BroadcastBucket, servers: Sequence[PausedServer]
    ) -> tuple[dict[str, TransferFailure], float]:
        """Returns (failures by server name, seconds from the last byte to the servers' answers)."""
        answers = {}
        if self._groups.is_main:
            dtype = self._channel.dtype
            request = {
                "names": list(bucket.names),
                "dtypes": [dtype] * len(bucket.names),
                "shapes": [list(shape) for shape in bucket.shapes],
                "group_name": self._group_names[bucket.source],
                "load_format": "flattened_bucket",
            }
            answers = {server.name: server.update_weights_from_distributed(request) for server in servers}
        whole, error = self._gather(bucket), None
        if whole is not None:
            try:
                options = dist.BroadcastOptions()
                options.rootRank = 0
                self._own_groups[bucket.source].broadcast([whole.view(torch.uint8)], options).wait()
            except RuntimeError as failed:
                error = f"trainer rank {bucket.source}: {failed}"
        start = time.perf_counter()
        return self._failures(answers, error), time.perf_counter() - start

    def _gather(self, bucket: _BroadcastBucket) -> Tensor | None:
        """Gathers the bucket's tensors, one after the other in a flat tensor, on its source; None on other ranks."""
        rank, tensors = self._groups.rank, self._shards.tensors()
        mine = bucket.ops.get(rank, ())
        packed = torch.empty(num_elements(mine), dtype=self._shards.dtype, device=device())
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
        for sender, ops in sorted(bucket.ops.items()):
            received = packed
            if sender != rank:
                received = torch.empty_like(whole[: num_elements(ops)])
                dist.recv(received, sender)
            unpack(ops, received, targets)
        return whole

    def _failures(self, answers: Mapping[str, Future[None]], error: str | None) -> dict[str, TransferFailure]:
        """Waits for answers; returns failures by server name on every rank.

        error: error of this trainer rank; any rank's error is a failure of every server.
        """
        errors = [text for part in self._groups.gather_over_world([error] if error else []) for text in part]
        if errors:
            self._close_groups()  # so that servers that wait for this rank fail at once
        failures = {}
        for name, answer in answers.items():
            failure = failure_of_answer(answer) or (TransferFailure(errors[0]) if errors else None)
            if failure is not None:
                failures[name] = failure
        return self._groups.from_main(failures)

    def _leave(self, servers: Sequence[PausedServer]) -> None:
        """Destroys the groups on both sides; failures are ignored, because lost servers have no groups."""
        answers = [
            server.destroy_weights_update_group(name) for server in servers for name in self._group_names.values()
        ]
        for answer in answers:
            failure_of_answer(answer)
        self._close_groups()
        self._group_names.clear()
        self._server_names = ()

    def _close_groups(self) -> None:
        """Destroys this rank's groups."""
        for group in self._own_groups.values():
            dist.destroy_process_group(group)
        self._own_groups.clear()

    def close(self) -> None:
        """Destroys this rank's groups."""
        self._leave(())


def _buckets(shards: PolicyShards, max_elements: int) -> list[_BroadcastBucket]:
    """Groups whole tensors into buckets of at most `max_elements`; a larger tensor is alone, none spans two sources."""
    layout, table = shards.layout, shards.table
    runs: list[tuple[int, list[str]]] = []
    room = 0
    gathering = plan_gathering(table, shards.geometry, layout)
    for name, by_rank in gathering.items():
        source = min(layout.replicas(min(by_rank) // (layout.num_ranks // layout.pipeline), 0))
        size = torch.Size(table.origins[name].shape).numel()
        if not runs or runs[-1][0] != source or size > room:
            runs.append((source, []))
            room = max_elements
        runs[-1][1].append(name)
        room -= size
    found = []
    for source, names in runs:
        ops: dict[int, list[TransferOp]] = {}
        for name in names:
            for rank, part in gathering[name].items():
                ops.setdefault(rank, []).extend(part)
        found.append(_BroadcastBucket(source, tuple(names), tuple(table.origins[name].shape for name in names), ops))
    return found
