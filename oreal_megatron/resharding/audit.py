"""The audit after every publication: what servers hold, element for element, against what the trainer holds."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from oreal_megatron.resharding.checksums import Checksums, added, checksum
from oreal_megatron.resharding.delivery import Failure, PausedServer
from oreal_megatron.resharding.loader import Audit
from oreal_megatron.resharding.orders import Desk
from oreal_megatron.resharding.plan import Receiver, plan_resharding
from oreal_megatron.resharding.served import EngineLayout
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
        tensors = self._shards.tensors()
        sums = []
        for rank in range(self._desk.tensor):
            items = self._plan.sent.get((self._shards.groups.rank, Receiver(0, rank)), ())
            sums.append(
                added(
                    {item.target: checksum(view(tensors[item.source], item.source_box), item.target_box)}
                    for item in items
                )
            )
        return sums

    def close(self) -> None:
        self._desk.close()


def _difference(expected: Mapping[str, int], found: Mapping[str, int]) -> str | None:
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name, 0) != found.get(name))
    return f"{len(wrong)} of {len(found)} tensors differ from the trainer's, first {wrong[0]}" if wrong else None
