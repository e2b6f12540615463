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

from oreal_megatron.distributed.cpu_backend import collective_backend
from oreal_megatron.weight_sync.commands import CommandChannel, PendingCommand, failure_of
from oreal_megatron.weight_sync.p2p import Rendezvous, Sender, join
from oreal_megatron.weight_sync.planner import ReshardingPlan, plan_resharding
from oreal_megatron.weight_sync.planner import ServerRank as ServerRank
from oreal_megatron.weight_sync.sglang_layout import SGLangLayout
from oreal_megatron.weight_sync.source import PolicyShards
from oreal_megatron.weight_sync.types import PausedServer, TransferFailure, TransferResult
from oreal_megatron.weight_sync.worker import Receive, arrival_key, start

_LOOK_SECONDS = 0.02


class DirectTransport:
    """See Transport."""

    def __init__(self, shards: PolicyShards, layout: SGLangLayout, channel: CommandChannel, *, bucket_bytes: int):
        """layout: of each server; how many there are is known when sending."""
        self._shards = shards
        self._groups = shards.groups
        self._layout = layout
        self._channel = channel
        self._bucket_bytes = bucket_bytes
        self._plan: ReshardingPlan | None = None
        self._sender: Sender | None = None
        self._rendezvous: Rendezvous | None = None
        self._server_names: tuple[str, ...] = ()

    def prepare(self, weight_version: int) -> None:
        """Nothing: weights leave from where they are."""

    def send(self, servers: Sequence[PausedServer]) -> TransferResult:
        """See Transport. A process that ends in the middle breaks the group: then no server has the weights."""
        start = time.perf_counter()
        server_names: tuple[str, ...] = self._groups.from_main(tuple(server.name for server in servers))
        if not server_names:
            return TransferResult()
        plan = self._planned(len(server_names))
        planned = time.perf_counter()
        is_new = self._sender is None or server_names != self._server_names
        if is_new:
            self._leave()
            self._server_names = server_names
            self._rendezvous = self._groups.from_main(self._called(plan))
        commands = self._send_commands(servers, plan, with_plan=is_new)
        error = self._joined(plan, commands) if is_new else None
        error = error or self._sent()
        outcomes = self._groups.gather_over_world([(error, time.perf_counter() - planned)])
        errors = [error for part in outcomes for error, _ in part if error is not None]
        if errors:
            self._leave()  # workers that wait for this rank hear at once that it is gone
        failures, load_seconds = self._groups.from_main(self._answered(commands, errors))
        if failures:
            self._leave()
        return TransferResult(
            failures=failures,
            num_bytes=plan.num_elements * self._shards.dtype.itemsize,
            seconds={
                "plan": planned - start,
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

    def _called(self, plan: ReshardingPlan) -> Rendezvous | None:
        if not self._groups.is_main:
            return None
        return Rendezvous(
            self._channel.host,
            self._channel.port,
            f"meetings/{uuid.uuid4().hex}",
            num_senders=plan.num_senders,
            num_receivers=self._layout.count * self._layout.tensor,
            timeout_seconds=self._channel.timeout_seconds,
        )

    def _send_commands(
        self, servers: Sequence[PausedServer], plan: ReshardingPlan, *, with_plan: bool
    ) -> dict[str, PendingCommand]:
        """Server -> its workers' orders; empty on other ranks than the main one."""
        if not self._groups.is_main:
            return {}
        assert self._rendezvous is not None
        commands = {}
        for number, server in enumerate(servers):
            encoded = []
            for rank in range(self._layout.tensor):
                task = Receive(
                    rendezvous=self._rendezvous,
                    number=number * self._layout.tensor + rank,
                    bucket_bytes=self._bucket_bytes,
                    backend=collective_backend(),
                    rectangles=plan.of_receiver(ServerRank(number, rank)) if with_plan else None,
                )
                encoded.append(self._channel.encode(task, rank))
            commands[server.name] = self._channel.send(server, encoded)
        return commands

    def _joined(self, plan: ReshardingPlan, commands: dict[str, PendingCommand]) -> str | None:
        """Makes the group and this rank's sender, or says why not."""
        assert self._rendezvous is not None
        rendezvous = self._rendezvous
        have_come = self._groups.from_main(self._all_came(rendezvous, [one.answer for one in commands.values()]))
        if not have_come:
            return "not all servers came to the meeting"
        receivers = [ServerRank(e, r) for e in range(self._layout.count) for r in range(self._layout.tensor)]
        try:
            self._sender = Sender(
                join(rendezvous, self._groups.rank, collective_backend()),
                self._groups.rank,
                rendezvous.num_senders,
                {receivers.index(to): items for to, items in plan.of_sender(self._groups.rank).items()},
                rendezvous.num_receivers,
                dtype=self._shards.dtype,
                bucket_bytes=self._bucket_bytes,
            )
        except RuntimeError as error:
            return f"trainer rank {self._groups.rank} could not join: {error}"
        return None

    def _all_came(self, rendezvous: Rendezvous, answers: Sequence[Future[None]]) -> bool | None:
        """Whether every worker has come; false as soon as a server has answered instead. On the main rank."""
        if not self._groups.is_main:
            return None
        assert self._channel.store is not None
        missing = [arrival_key(rendezvous, number) for number in range(rendezvous.num_receivers)]
        while missing and not any(answer.done() for answer in answers):
            missing = [key for key in missing if not self._channel.store.check([key])]
            if missing:
                wait(answers, timeout=_LOOK_SECONDS, return_when="FIRST_COMPLETED")
        start(self._channel.store, rendezvous, joining=not missing)
        return not missing

    def _sent(self) -> str | None:
        """Sends this rank's part, or says why not."""
        assert self._sender is not None
        try:
            self._sender.send(self._shards.tensors())
        except RuntimeError as error:
            return f"trainer rank {self._groups.rank}: {error}"
        return None

    def _answered(
        self, commands: dict[str, PendingCommand], errors: Sequence[str]
    ) -> tuple[dict[str, TransferFailure], float] | None:
        """(server -> why it failed, seconds until the last answer), on the main rank."""
        if not self._groups.is_main:
            return None
        start = time.perf_counter()
        failures = {}
        for name, pending in commands.items():
            failure = failure_of(self._channel, pending)
            if failure is None and errors:
                failure = TransferFailure(errors[0])
            if failure is not None:
                failures[name] = failure
        return failures, time.perf_counter() - start

    def _leave(self) -> None:
        self._sender = None
        self._rendezvous = None

    def close(self) -> None:
        """Leaves the group."""
        self._leave()
