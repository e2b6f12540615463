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

from oreal_megatron.parallel.device import device
from oreal_megatron.resharding.checksums import Checksums, added, checksum, whole
from oreal_megatron.resharding.delivery import Failure, PausedServer
from oreal_megatron.resharding.fp8 import block_amax, quantised, scales_for
from oreal_megatron.resharding.loader import Audit
from oreal_megatron.resharding.orders import Desk
from oreal_megatron.resharding.plan import Receiver, Rectangle, plan_resharding
from oreal_megatron.resharding.served import EngineLayout, scales_of
from oreal_megatron.resharding.shards import PolicyShards
from oreal_megatron.resharding.transport import view


class Auditor:
    """Each trainer rank sums up its part, each server's worker its own; only sums travel."""

    def __init__(self, shards: PolicyShards, layout: EngineLayout, desk: Desk):
        """layout: of each server, whatever its count."""
        self._shards = shards
        self._desk = desk
        self._plan = plan_resharding(shards.table, shards.geometry, shards.trainer, replace(layout, count=1))

    def audit(self, servers: Sequence[PausedServer]) -> tuple[dict[str, Failure], float]:
        """(server -> what is wrong, seconds), the same on every rank, all of which call this.

        servers: read on the main rank only.
        """
        start = time.perf_counter()
        groups, desk = self._shards.groups, self._desk
        given = {}
        if groups.is_main:
            ranks = range(desk.tensor)
            given = {server.name: desk.give(server, [desk.write(Audit(), r) for r in ranks]) for server in servers}
        expected = [added(parts) for parts in zip(*groups.gather_over_world(self._expected()), strict=True)]
        failures: dict[str, Failure] = {}
        for name, one in given.items():
            try:
                reports = desk.reports(one)
            except (ConnectionError, ValueError) as error:
                failures[name] = Failure(f"could not be audited: {error}", isinstance(error, ConnectionError))
                continue
            for rank, report in enumerate(reports):
                found = report.error or _difference(expected[rank], report.checksums or {})
                if found:
                    failures[name] = Failure(f"tensor-parallel rank {rank}: {found}")
                    break
        return groups.from_main(failures), time.perf_counter() - start

    def _expected(self) -> list[Checksums]:
        """This rank's share of the sums, by the server's tensor-parallel rank."""
        scales = self._scales()
        sums = []
        for rank in range(self._desk.tensor):
            parts = ({item.target: self._sum(item, part, scales[rank])} for item, part in self._parts(rank))
            # Scales are the same on every trainer rank, which have agreed on them.
            of_scales = {scales_of(name): whole(scale) for name, scale in scales[rank].items()}
            sums.append(added([*parts, of_scales if self._shards.groups.is_main else {}]))
        return sums

    def _parts(self, rank: int) -> Iterator[tuple[Rectangle, Tensor]]:
        """What this trainer rank sends to a server's rank, as it travels."""
        tensors = self._shards.tensors()
        for item in self._plan.sent.get((self._shards.groups.rank, Receiver(0, rank)), ()):
            yield item, view(tensors[item.source], item.source_box).to(self._shards.dtype)

    def _sum(self, item: Rectangle, part: Tensor, scales: Mapping[str, Tensor]) -> int:
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
        self._desk.close()


def _split(flat: Tensor, shapes: Sequence[Mapping[str, tuple[int, ...]]]) -> list[dict[str, Tensor]]:
    """Views of a flat tensor, one after the other."""
    pieces = iter(flat.split([math.prod(shape) for part in shapes for shape in part.values()]))
    return [{name: next(pieces).view(shape) for name, shape in part.items()} for part in shapes]


def _difference(expected: Mapping[str, int], found: Mapping[str, int]) -> str | None:
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name, 0) != found.get(name))
    return f"{len(wrong)} of {len(found)} tensors differ from the trainer's, first {wrong[0]}" if wrong else None
