"""The direct transport: every server rank is sent exactly its own bytes, by the trainer ranks that hold them.

All trainer ranks and all workers of the servers are one process group, made anew when servers came or went. The main
rank hands every worker its order over HTTP, then all send at once.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from concurrent.futures import Future, wait
from dataclasses import replace

from oreal_megatron.parallel.device import collective_backend
from oreal_megatron.resharding.delivery import Delivery, Failure, PausedServer
from oreal_megatron.resharding.loader import Receive, arrival_key, start
from oreal_megatron.resharding.orders import Desk, Given, failure_of
from oreal_megatron.resharding.plan import Receiver as At
from oreal_megatron.resharding.plan import ReshardingPlan, plan_resharding
from oreal_megatron.resharding.served import EngineLayout
from oreal_megatron.resharding.shards import PolicyShards
from oreal_megatron.resharding.transport import Meeting, Sender, join

_LOOK_SECONDS = 0.02


class DirectTransport:
    """See Transport."""

    def __init__(self, shards: PolicyShards, layout: EngineLayout, desk: Desk, *, bucket_bytes: int):
        """layout: of each server; how many there are is known when sending."""
        self._shards = shards
        self._groups = shards.groups
        self._layout = layout
        self._desk = desk
        self._bucket_bytes = bucket_bytes
        self._plan: ReshardingPlan | None = None
        self._sender: Sender | None = None
        self._meeting: Meeting | None = None
        self._members: tuple[str, ...] = ()

    def prepare(self, weight_version: int) -> None:
        """Nothing: weights leave from where they are."""

    def send(self, servers: Sequence[PausedServer]) -> Delivery:
        """See Transport. A process that ends in the middle breaks the group: then no server has the weights."""
        begun = time.perf_counter()
        members: tuple[str, ...] = self._groups.from_main(tuple(server.name for server in servers))
        if not members:
            return Delivery()
        plan = self._planned(len(members))
        planned = time.perf_counter()
        is_new = self._sender is None or members != self._members
        if is_new:
            self._leave()
            self._members = members
            self._meeting = self._groups.from_main(self._called(plan))
        orders = self._ordered(servers, plan, with_plan=is_new)
        error = self._joined(plan, orders) if is_new else None
        error = error or self._sent()
        outcomes = self._groups.gather_over_world([(error, time.perf_counter() - planned)])
        errors = [error for part in outcomes for error, _ in part if error is not None]
        if errors:
            self._leave()  # workers that wait for this rank hear at once that it is gone
        failures, load_seconds = self._groups.from_main(self._answered(orders, errors))
        if failures:
            self._leave()
        return Delivery(
            failures=failures,
            num_bytes=plan.num_elements * self._shards.dtype.itemsize,
            seconds={
                "plan": planned - begun,
                "transfer": max(seconds for part in outcomes for _, seconds in part),
                "load": load_seconds,
            },
        )

    def _planned(self, num_servers: int) -> ReshardingPlan:
        if self._plan is None or self._layout.count != num_servers:
            self._layout = replace(self._layout, count=num_servers)
            shards = self._shards
            self._plan = plan_resharding(shards.table, shards.geometry, shards.trainer, self._layout)
        return self._plan

    def _called(self, plan: ReshardingPlan) -> Meeting | None:
        if not self._groups.is_main:
            return None
        return Meeting(
            self._desk.host,
            self._desk.port,
            f"meetings/{uuid.uuid4().hex}",
            num_senders=plan.num_senders,
            num_receivers=self._layout.count * self._layout.tensor,
            timeout_seconds=self._desk.timeout_seconds,
        )

    def _ordered(self, servers: Sequence[PausedServer], plan: ReshardingPlan, *, with_plan: bool) -> dict[str, Given]:
        """Server -> its workers' orders; empty on other ranks than the main one."""
        if not self._groups.is_main:
            return {}
        assert self._meeting is not None
        orders = {}
        for number, server in enumerate(servers):
            written = []
            for rank in range(self._layout.tensor):
                task = Receive(
                    meeting=self._meeting,
                    number=number * self._layout.tensor + rank,
                    bucket_bytes=self._bucket_bytes,
                    backend=collective_backend(),
                    rectangles=plan.of_receiver(At(number, rank)) if with_plan else None,
                )
                written.append(self._desk.write(task, rank))
            orders[server.name] = self._desk.give(server, written)
        return orders

    def _joined(self, plan: ReshardingPlan, orders: dict[str, Given]) -> str | None:
        """Makes the group and this rank's sender, or says why not."""
        assert self._meeting is not None
        meeting = self._meeting
        have_come = self._groups.from_main(self._all_came(meeting, [one.answer for one in orders.values()]))
        if not have_come:
            return "not all servers came to the meeting"
        receivers = [At(e, r) for e in range(self._layout.count) for r in range(self._layout.tensor)]
        try:
            self._sender = Sender(
                join(meeting, self._groups.rank, collective_backend()),
                self._groups.rank,
                meeting.num_senders,
                {receivers.index(to): items for to, items in plan.of_sender(self._groups.rank).items()},
                meeting.num_receivers,
                dtype=self._shards.dtype,
                bucket_bytes=self._bucket_bytes,
            )
        except RuntimeError as error:
            return f"trainer rank {self._groups.rank} could not join: {error}"
        return None

    def _all_came(self, meeting: Meeting, answers: Sequence[Future[None]]) -> bool | None:
        """Whether every worker has come; false as soon as a server has answered instead. On the main rank."""
        if not self._groups.is_main:
            return None
        assert self._desk.store is not None
        missing = [arrival_key(meeting, number) for number in range(meeting.num_receivers)]
        while missing and not any(answer.done() for answer in answers):
            missing = [key for key in missing if not self._desk.store.check([key])]
            if missing:
                wait(answers, timeout=_LOOK_SECONDS, return_when="FIRST_COMPLETED")
        start(self._desk.store, meeting, joining=not missing)
        return not missing

    def _sent(self) -> str | None:
        """Sends this rank's part, or says why not."""
        assert self._sender is not None
        try:
            self._sender.send(self._shards.tensors())
        except RuntimeError as error:
            return f"trainer rank {self._groups.rank}: {error}"
        return None

    def _answered(self, orders: dict[str, Given], errors: Sequence[str]) -> tuple[dict[str, Failure], float] | None:
        """(server -> why it failed, seconds until the last answer), on the main rank."""
        if not self._groups.is_main:
            return None
        begun = time.perf_counter()
        failures = {}
        for name, given in orders.items():
            failure = failure_of(self._desk, given)
            if failure is None and errors:
                failure = Failure(errors[0])
            if failure is not None:
                failures[name] = failure
        return failures, time.perf_counter() - begun

    def _leave(self) -> None:
        self._sender = None
        self._meeting = None

    def close(self) -> None:
        """Leaves the group."""
        self._leave()
