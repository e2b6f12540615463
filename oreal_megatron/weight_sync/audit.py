"""The audit after every publication: compares all elements of the servers' parameters with the trainer's weights.

Servers in FP8 hold quantised weights. The trainer's ranks quantise their parts of the same weights themselves, after
they have agreed on the largest value of each block, so the comparison covers the numbers that the servers compute with.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from oreal_megatron.distributed.cpu_backend import device
from oreal_megatron.weight_sync.checksums import Checksums, added, checksum, whole
from oreal_megatron.weight_sync.commands import CommandChannel
from oreal_megatron.weight_sync.fp8_blocks import block_amax, quantised, scales_for
from oreal_megatron.weight_sync.p2p import view
from oreal_megatron.weight_sync.planner import ReshardingPlan, TransferOp, ops_by_receiver
from oreal_megatron.weight_sync.sglang_layout import scales_of
from oreal_megatron.weight_sync.source import PolicyShards
from oreal_megatron.weight_sync.types import PausedServer, TransferFailure


class Auditor:
    """Compares checksums: each trainer rank computes those of its part, each worker those of its parameters."""

    def __init__(self, shards: PolicyShards, plan: ReshardingPlan, channel: CommandChannel):
        self._shards = shards
        self._channel = channel
        self._targets = plan.targets
        assigned = ops_by_receiver(plan.assign(num_servers=1), shards.groups.rank)
        self._ops = [assigned.get(rank, ()) for rank in range(plan.tensor)]
        """Ops whose elements this trainer rank sums up, by the server's tensor-parallel rank."""
        self._thread = ThreadPoolExecutor(1, "audit")

    def start_sums(self) -> Future[list[Checksums]]:
        """Starts to sum up this trainer rank's weights in a thread; all ranks call this.

        The thread works while the weights are sent, because sending does not change them.
        """
        return self._thread.submit(self._expected, self._scales())

    def audit(
        self,
        servers: Sequence[PausedServer],
        sums: Future[list[Checksums]],
        known: Mapping[str, Sequence[Mapping[str, int]]],
    ) -> tuple[dict[str, TransferFailure], float]:
        """Returns (failures by server name, seconds), the same on every rank; all ranks call this.

        servers: read on the main rank only. sums: from `start_sums`, with the weights that were sent. known: checksums
        of `TransferResult`; the other servers are asked.
        """
        start = time.perf_counter()
        groups, channel = self._shards.groups, self._channel
        answers = {}
        if groups.is_main:
            ranks = range(channel.tensor)
            answers = {
                server.name: channel.send(server, [channel.encode("checksums", r) for r in ranks])
                for server in servers
                if server.name not in known
            }
        expected = [added(parts) for parts in zip(*groups.gather_over_world(sums.result()), strict=True)]
        failures: dict[str, TransferFailure] = {}
        found = {server.name: known[server.name] for server in servers if server.name in known}
        for name, answer in answers.items():
            reports, failure = channel.answered(answer)
            if failure is not None:
                failures[name] = TransferFailure(f"could not be audited: {failure.reason}", failure.is_lost)
            else:
                found[name] = [report.checksums or {} for report in reports]
        for name, by_rank in found.items():
            for rank, checksums in enumerate(by_rank):
                if difference := _difference(expected[rank], checksums):
                    failures[name] = TransferFailure(f"tensor-parallel rank {rank}: {difference}")
                    break
        return groups.from_main(failures), time.perf_counter() - start

    @torch.no_grad()
    def _expected(self, scales: Sequence[Mapping[str, Tensor]]) -> list[Checksums]:
        """Computes this trainer rank's share of the checksums, by the server's tensor-parallel rank."""
        sums = []
        for rank in range(self._channel.tensor):
            parts = ({op.target: self._sum(op, part, scales[rank])} for op, part in self._parts(rank))
            # All trainer ranks have the same scales, so only the main rank adds them.
            of_scales = {scales_of(name): whole(scale) for name, scale in scales[rank].items()}
            sums.append(added([*parts, of_scales if self._shards.groups.is_main else {}]))
        return sums

    def _parts(self, rank: int) -> Iterator[tuple[TransferOp, Tensor]]:
        """Yields this trainer rank's ops for a server's rank, with their elements in the policy's dtype."""
        tensors = self._shards.tensors()
        for op in self._ops[rank]:
            yield op, view(tensors[op.source], op.source_box)

    def _sum(self, op: TransferOp, part: Tensor, scales: Mapping[str, Tensor]) -> int:
        if op.target not in scales:
            return checksum(part, op.target_box, self._shards.dtype)
        return checksum(quantised(part.to(self._shards.dtype), op.target_box, scales[op.target]), op.target_box)

    def _scales(self) -> list[dict[str, Tensor]]:
        """Computes the scales of the server's FP8 weights, by its rank: from each block's largest value on any rank."""
        shapes = [{tensor.name: tensor.num_blocks for tensor in tensors if tensor.is_fp8} for tensors in self._targets]
        if not any(shapes):
            return [{} for _ in shapes]
        largest = torch.zeros(sum(math.prod(shape) for part in shapes for shape in part.values()), device=device())
        for rank, by_name in enumerate(_split(largest, shapes)):
            for op, part in self._parts(rank):
                if op.target in by_name:
                    found, blocks = block_amax(part.to(self._shards.dtype), op.target_box)
                    by_name[op.target][blocks] = torch.maximum(by_name[op.target][blocks], found)
        return _split(scales_for(self._shards.groups.max_over_world(largest)), shapes)

    def close(self) -> None:
        self._thread.shutdown()
        self._channel.close()


def _split(flat: Tensor, shapes: Sequence[Mapping[str, tuple[int, ...]]]) -> list[dict[str, Tensor]]:
    """Splits a flat tensor into views of the given shapes, one after the other."""
    pieces = iter(flat.split([math.prod(shape) for part in shapes for shape in part.values()]))
    return [{name: next(pieces).view(shape) for name, shape in part.items()} for part in shapes]


def _difference(expected: Mapping[str, int], found: Mapping[str, int]) -> str | None:
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name, 0) != found.get(name))
    return f"{len(wrong)} of {len(found)} tensors differ from the trainer's, first {wrong[0]}" if wrong else None
