"""Direct publication: every server rank is sent exactly its own bytes, by the trainer ranks that hold them.

One publication, seen from the trainer: all ranks agree on a meeting (anew when servers came or went), the main one
hands every engine its workers' orders over HTTP, all send, then the checksums that the senders expect are compared with
those that the workers found.
"""

from __future__ import annotations

import socket
import time
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from oreal_megatron.config import GeometryConfig
from oreal_megatron.convert.rules import Table
from oreal_megatron.parallel.device import collective_backend
from oreal_megatron.parallel.groups import ParallelGroups
from oreal_megatron.resharding.loader import LOADER, Order, WorkerReport, report_key
from oreal_megatron.resharding.plan import Receiver as At
from oreal_megatron.resharding.plan import ReshardingPlan, TrainerLayout, plan_resharding
from oreal_megatron.resharding.served import EngineLayout
from oreal_megatron.resharding.transport import Checksums, Meeting, Sender, join


class LoadingEngine(Protocol):
    """A paused engine that takes weight updates."""

    @property
    def name(self) -> str: ...

    def load(self, payloads: Sequence[Tensor], load_format: str, *, timeout_seconds: float) -> None:
        """Has each tensor-parallel worker run its custom loader on its payload.

        Raises:
            OSError: the engine is not there (any more), or refused.
        """


@dataclass(frozen=True)
class DirectReport:
    """One publication, the same on all trainer ranks."""

    failures: Mapping[str, str]
    """Engine -> why it does not have the weights; empty: all have them, audited."""
    num_bytes: int
    """Sent by all ranks."""
    plan_seconds: float
    transfer_seconds: float
    """From the first order to the last byte, over the slowest rank; joining included where servers came or went."""
    audit_seconds: float
    """The slowest worker's."""


class DirectTransport:
    """Sends the trainer's weights to engines of one layout. Every rank builds one and calls `send` together."""

    def __init__(
        self,
        table: Table,
        geometry: GeometryConfig,
        trainer: TrainerLayout,
        engine_layout: EngineLayout,
        groups: ParallelGroups,
        *,
        dtype: torch.dtype,
        bucket_bytes: int,
        timeout_seconds: float,
    ):
        """engine_layout: of each engine; how many there are is known when sending. dtype: of the served weights."""
        self._table = table
        self._geometry = geometry
        self._trainer = trainer
        self._layout = engine_layout
        self._groups = groups
        self._dtype = dtype
        self._bucket_bytes = bucket_bytes
        self._timeout = timeout_seconds
        self._plan: ReshardingPlan | None = None
        self._sender: Sender | None = None
        self._meeting: Meeting | None = None
        self._members: tuple[str, ...] = ()
        self._store: dist.TCPStore | None = None

    def send(self, shards: Mapping[str, Tensor], engines: Sequence[LoadingEngine], publication: str) -> DirectReport:
        """Sends `shards` (this rank's, by Megatron's name) to all engines, and audits what arrived.

        engines: read on the main rank only; the same list as before, or another one when servers came or went.
        publication: a name that was not used before.
        """
        start = time.perf_counter()
        members: tuple[str, ...] = self._groups.from_main(tuple(engine.name for engine in engines))
        plan = self._planned(len(members))
        planned = time.perf_counter()
        is_new = self._meeting is None or members != self._members
        if is_new:
            self._leave()
            self._meeting, self._members = self._groups.from_main(self._called(plan, members)), members
        meeting = self._meeting
        assert meeting is not None
        with ThreadPoolExecutor(max(len(engines), 1)) as pool:
            orders = self._ordered(pool, engines, plan, publication, with_plan=is_new)
            expected, error = self._sent(plan, shards)
            outcomes = self._groups.gather_over_world([(expected, error, time.perf_counter() - planned)])
            sent = [outcome for part in outcomes for outcome in part]
            broken = next((error for _, error, _ in sent if error is not None), None)
            if broken is not None:
                # The workers that wait for this rank hear at once that it is gone.
                self._leave()
            failures, audit_seconds = self._groups.from_main(self._audited(meeting, orders, sent, broken, publication))
        if failures:
            self._leave()
        return DirectReport(
            failures=failures,
            num_bytes=plan.num_elements * self._dtype.itemsize,
            plan_seconds=planned - start,
            transfer_seconds=max(seconds for _, _, seconds in sent),
            audit_seconds=audit_seconds,
        )

    def _planned(self, num_engines: int) -> ReshardingPlan:
        if self._plan is None or self._layout.count != num_engines:
            self._layout = replace(self._layout, count=num_engines)
            self._plan = plan_resharding(self._table, self._geometry, self._trainer, self._layout)
        return self._plan

    def _receivers(self) -> list[At]:
        return [At(e, r) for e in range(self._layout.count) for r in range(self._layout.tensor)]

    def _called(self, plan: ReshardingPlan, members: Sequence[str]) -> Meeting | None:
        """A new meeting, from the main rank; its store lives as long as this object."""
        if not self._groups.is_main:
            return None
        host = socket.gethostbyname(socket.gethostname())
        if self._store is None:
            self._store = dist.TCPStore(
                "0.0.0.0", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=self._timeout)
            )
        return Meeting(
            host,
            self._store.port,
            uuid.uuid4().hex,
            num_senders=plan.num_senders,
            num_receivers=len(members) * self._layout.tensor,
            timeout_seconds=self._timeout,
        )

    def _ordered(
        self,
        pool: ThreadPoolExecutor,
        engines: Sequence[LoadingEngine],
        plan: ReshardingPlan,
        publication: str,
        *,
        with_plan: bool,
    ) -> dict[str, Future[None]]:
        """Engine -> its answer to come."""
        if not self._groups.is_main:
            return {}
        assert self._meeting is not None
        answers = {}
        for number, engine in enumerate(engines):
            payloads = []
            for rank in range(self._layout.tensor):
                shapes = {tensor.name: tensor.shape for tensor in plan.targets[rank]} if with_plan else None
                order = Order(
                    meeting=self._meeting,
                    number=number * self._layout.tensor + rank,
                    publication=publication,
                    dtype=str(self._dtype).removeprefix("torch."),
                    bucket_bytes=self._bucket_bytes,
                    backend=collective_backend(),
                    shapes=shapes,
                    rectangles=plan.of_receiver(At(number, rank)) if with_plan else None,
                )
                payloads.append(order.encoded())
            answers[engine.name] = pool.submit(engine.load, payloads, LOADER, timeout_seconds=2 * self._timeout)
        return answers

    def _sent(
        self, plan: ReshardingPlan, shards: Mapping[str, Tensor]
    ) -> tuple[Mapping[int, Checksums] | None, str | None]:
        """(checksums to expect, None), or (None, what went wrong)."""
        assert self._meeting is not None
        rank = dist.get_rank()
        try:
            if self._sender is None:
                receivers = self._receivers()
                self._sender = Sender(
                    join(self._meeting, rank, collective_backend()),
                    rank,
                    self._meeting.num_senders,
                    {receivers.index(to): items for to, items in plan.of_sender(rank).items()},
                    self._meeting.num_receivers,
                    dtype=self._dtype,
                    bucket_bytes=self._bucket_bytes,
                )
            return self._sender.send(shards), None
        except RuntimeError as error:
            return None, f"trainer rank {rank}: {error}"

    def _audited(
        self,
        meeting: Meeting,
        orders: Mapping[str, Future[None]],
        sent: Sequence[tuple[Mapping[int, Checksums] | None, str | None, float]],
        broken: str | None,
        publication: str,
    ) -> tuple[dict[str, str], float] | None:
        """(engine -> why it failed, the slowest audit's seconds), on the main rank."""
        if not self._groups.is_main:
            return None
        failures: dict[str, str] = {}
        audits = [0.0]
        for number, (name, answer) in enumerate(orders.items()):
            try:
                answer.result()
            except OSError as error:
                failures[name] = f"did not load: {error}"
                continue
            for rank in range(self._layout.tensor):
                report = self._report(meeting, number * self._layout.tensor + rank, publication)
                audits.append(report.audit_seconds)
                problem = report.error or broken or self._difference(number * self._layout.tensor + rank, report, sent)
                if problem:
                    failures.setdefault(name, f"tensor-parallel rank {rank}: {problem}")
        return failures, max(audits)

    def _report(self, meeting: Meeting, number: int, publication: str) -> WorkerReport:
        assert self._store is not None
        try:
            return WorkerReport.decoded(self._store.get(report_key(meeting, publication, number)))
        except (RuntimeError, ValueError) as error:
            return WorkerReport(error=f"no report: {error}")

    def _difference(
        self,
        number: int,
        report: WorkerReport,
        sent: Sequence[tuple[Mapping[int, Checksums] | None, str | None, float]],
    ) -> str | None:
        """What the audit found to differ from what was sent to receiver `number`."""
        expected: dict[str, int] = {}
        for checksums, _, _ in sent:
            for name, value in (checksums or {}).get(number, {}).items():
                expected[name] = (expected.get(name, 0) + value) % 2**64
        found = report.checksums or {}
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        return f"{len(wrong)} of {len(expected)} tensors differ from the trainer's, first {wrong[0]}" if wrong else None

    def _leave(self) -> None:
        self._sender = None
        self._meeting = None

    def close(self) -> None:
        """Leaves the meeting and closes its store."""
        self._leave()
        self._store = None
