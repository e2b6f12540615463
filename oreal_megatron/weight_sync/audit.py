"""The audit after every publication: what servers hold, element for element, against what the trainer holds.

Servers in FP8 hold quantised weights. The trainer's ranks quantise their parts of the same weights for themselves,
after they have agreed on the largest value of each block, so that what is compared is what generates.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from oreal_megatron.distributed.cpu_backend import device
from oreal_megatron.weight_sync.checksums import Checksums, added, checksum, whole
from oreal_megatron.weight_sync.commands import CommandChannel
from oreal_megatron.weight_sync.fp8_blocks import block_amax, quantised, scales_for
from oreal_megatron.weight_sync.p2p import view
from oreal_megatron.weight_sync.planner import ServerRank, TransferOp, plan_resharding
from oreal_megatron.weight_sync.sglang_layout import SGLangLayout, scales_of
from oreal_megatron.weight_sync.source import PolicyShards
from oreal_megatron.weight_sync.types import PausedServer, TransferFailure
from oreal_megatron.weight_sync.worker import Audit


class Auditor:
    """Each trainer rank sums up its part, each server's worker its own; only sums travel."""

    def __init__(self, shards: PolicyShards, layout: SGLangLayout, channel: CommandChannel):
        """layout: of each server, whatever its count."""
        self._shards = shards
        self._channel = channel
        self._plan = plan_resharding(shards.table, shards.geometry, shards.trainer, replace(layout, count=1))

    def audit(self, servers: Sequence[PausedServer]) -> tuple[dict[str, TransferFailure], float]:
        """(server -> what is wrong, seconds), the same on every rank, all of which call this.

        servers: read on the main rank only.
        """
        start = time.perf_counter()
        groups, channel = self._shards.groups, self._channel
        pending = {}
        if groups.is_main:
            ranks = range(channel.tensor)
            pending = {
                server.name: channel.send(server, [channel.encode(Audit(), r) for r in ranks]) for server in servers
            }
        expected = [added(parts) for parts in zip(*groups.gather_over_world(self._expected()), strict=True)]
        failures: dict[str, TransferFailure] = {}
        for name, one in pending.items():
            try:
                reports = channel.reports(one)
            except (ConnectionError, ValueError) as error:
                failures[name] = TransferFailure(f"could not be audited: {error}", isinstance(error, ConnectionError))
                continue
            for rank, report in enumerate(reports):
                found = report.error or _difference(expected[rank], report.checksums or {})
                if found:
                    failures[name] = TransferFailure(f"tensor-parallel rank {rank}: {found}")
                    break
        return groups.from_main(failures), time.perf_counter() - start

    def _expected(self) -> list[Checksums]:
        """This rank's share of the sums, by the server's tensor-parallel rank."""
        scales = self._scales()
        sums = []
        for rank in range(self._channel.tensor):
            parts = ({item.target: self._sum(item, part, scales[rank])} for item, part in self._parts(rank))
            # Scales are the same on every trainer rank, which have agreed on them.
            of_scales = {scales_of(name): whole(scale) for name, scale in scales[rank].items()}
            sums.append(added([*parts, of_scales if self._shards.groups.is_main else {}]))
        return sums

    def _parts(self, rank: int) -> Iterator[tuple[TransferOp, Tensor]]:
        """What this trainer rank sends to a server's rank, as it travels."""
        tensors = self._shards.tensors()
        for item in self._plan.sent.get((self._shards.groups.rank, ServerRank(0, rank)), ()):
            yield item, view(tensors[item.source], item.source_box).to(self._shards.dtype)

    def _sum(self, item: TransferOp, part: Tensor, scales: Mapping[str, Tensor]) -> int:
        if item.target in scales:
            part = quantised(part, item.target_box, scales[item.target])
        return checksum(part, item.target_box)

    def _scales(self) -> list[dict[str, Tensor]]:
        """Of the server's FP8 weights, by its rank: from the largest value of each block, whoever holds it."""
        shapes = [
            {tensor.name: tensor.num_blocks for tensor in tensors if tensor.is_fp8}
            for _, tensors in sorted(self._plan.targets.items())
        ]
        if not any(shapes):
            return [{} for _ in shapes]
        largest = torch.zeros(sum(math.prod(shape) for part in shapes for shape in part.values()), device=device())
        for rank, by_name in enumerate(_split(largest, shapes)):
            for item, part in self._parts(rank):
                if item.target in by_name:
                    found, blocks = block_amax(part, item.target_box)
                    by_name[item.target][blocks] = torch.maximum(by_name[item.target][blocks], found)
        return _split(scales_for(self._shards.groups.max_over_world(largest)), shapes)

    def close(self) -> None:
        self._channel.close()


def _split(flat: Tensor, shapes: Sequence[Mapping[str, tuple[int, ...]]]) -> list[dict[str, Tensor]]:
    """Views of a flat tensor, one after the other."""
    pieces = iter(flat.split([math.prod(shape) for part in shapes for shape in part.values()]))
    return [{name: next(pieces).view(shape) for name, shape in part.items()} for part in shapes]


def _difference(expected: Mapping[str, int], found: Mapping[str, int]) -> str | None:
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name, 0) != found.get(name))
    return f"{len(wrong)} of {len(found)} tensors differ from the trainer's, first {wrong[0]}" if wrong else None
