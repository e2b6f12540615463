"""The direct transport: every server rank is sent exactly its own bytes, by the trainer ranks that hold them.

All trainer ranks and all workers of the servers are one process group, which is set up again when the set of servers
changes. The main rank sends every worker its command over HTTP, then all trainer ranks send at once.

With `full_every` above 1 most publications send what has changed since the last one alone. All elements are sent to a
new group, at every `full_every`th publication, and where servers are sent to again: after a failed audit they do not
have what was sent last.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait

from oreal_megatron.distributed.cpu_backend import collective_backend
from oreal_megatron.weight_sync.checksums import Checksums
from oreal_megatron.weight_sync.commands import CommandChannel
from oreal_megatron.weight_sync.p2p import Rendezvous, Sender, join
from oreal_megatron.weight_sync.planner import Assignment, ReshardingPlan, ops_by_receiver, ops_by_sender
from oreal_megatron.weight_sync.source import PolicyShards
from oreal_megatron.weight_sync.types import PausedServer, TransferFailure, TransferResult
from oreal_megatron.weight_sync.worker import Receive, answer_arrivals, arrival_key

_POLL_SECONDS = 0.02


class DirectTransport:
    """See Transport."""

    def __init__(
        self,
        shards: PolicyShards,
        plan: ReshardingPlan,
        channel: CommandChannel,
        *,
        bucket_bytes: int,
        full_every: int = 1,
    ):
        """full_every: publications of which one sends all elements; above 1 each rank keeps a copy of its shards."""
        self._shards = shards
        self._groups = shards.groups
        self._plan = plan
        self._channel = channel
        self._bucket_bytes = bucket_bytes
        self._full_every = full_every
        self._num_sent = 0
        """Publications since all elements were sent, that one included."""
        self._is_first_attempt = False
        self._assignment: Assignment = {}
        self._sender: Sender | None = None
        self._rendezvous: Rendezvous | None = None
        self._server_names: tuple[str, ...] = ()

    def prepare(self, weight_version: int) -> None:
        """Has the next sending be the first of its publication. Weights are sent from where they are."""
        self._is_first_attempt = True

    def send(self, servers: Sequence[PausedServer]) -> TransferResult:
        """See Transport. A process that ends during the transfer breaks the group: then no server has the weights."""
        start = time.perf_counter()
        server_names: tuple[str, ...] = self._groups.from_main(tuple(server.name for server in servers))
        if not server_names:
            return TransferResult()
        if len(server_names) != len(self._server_names):
            self._assignment = self._plan.assign(len(server_names))
        planned = time.perf_counter()
        is_new = self._sender is None or server_names != self._server_names
        if is_new:
            self._leave()
            self._server_names = server_names
            self._rendezvous = self._groups.from_main(self._new_rendezvous())
        only_changes = self._is_first_attempt and not is_new and self._num_sent < self._full_every
        self._is_first_attempt = False
        self._num_sent = self._num_sent + 1 if only_changes else 1
        answers = self._send_commands(servers, with_ops=is_new, only_changes=only_changes)
        error = self._join(list(answers.values())) if is_new else None
        num_bytes, error = (0, error) if error else self._send_shards(only_changes=only_changes)
        outcomes = self._groups.gather_over_world([(error, time.perf_counter() - planned, num_bytes)])
        errors = [error for part in outcomes for error, _, _ in part if error is not None]
        if errors:
            self._leave()  # closes the connections, so that workers that wait for this rank fail at once
        failures, checksums, load_seconds = self._outcome(answers, errors)
        if failures:
            self._leave()
        return TransferResult(
            failures=failures,
            checksums=checksums,
            num_bytes=sum(num_bytes for part in outcomes for _, _, num_bytes in part),
            seconds={
                "plan": planned - start,
                "transfer": max(seconds for part in outcomes for _, seconds, _ in part),
                "load": load_seconds,
            },
        )

    def _new_rendezvous(self) -> Rendezvous | None:
        if not self._groups.is_main:
            return None
        return Rendezvous(
            self._channel.host,
            self._channel.port,
            f"rendezvous/{uuid.uuid4().hex}",
            num_senders=self._plan.num_senders,
            num_receivers=len(self._server_names) * self._plan.tensor,
            timeout_seconds=self._channel.timeout_seconds,
        )

    def _send_commands(
        self, servers: Sequence[PausedServer], *, with_ops: bool, only_changes: bool
    ) -> dict[str, Future[None]]:
        """Has all workers receive. Returns the answers by server name; none on other ranks than the main rank."""
        if not self._groups.is_main:
            return {}
        assert self._rendezvous is not None
        answers = {}
        for index, server in enumerate(servers):
            commands = []
            for rank in range(self._plan.tensor):
                number = index * self._plan.tensor + rank
                task = Receive(
                    rendezvous=self._rendezvous,
                    number=number,
                    bucket_bytes=self._bucket_bytes,
                    backend=collective_backend(),
                    ops=ops_by_sender(self._assignment, number) if with_ops else None,
                    only_changes=only_changes,
                )
                commands.append(self._channel.encode(task, rank))
            answers[server.name] = self._channel.send(server, commands)
        return answers

    def _join(self, answers: Sequence[Future[None]]) -> str | None:
        """Joins the group and creates this rank's sender; returns the error if that fails."""
        assert self._rendezvous is not None
        if not self._groups.from_main(self._all_arrived(self._rendezvous, answers)):
            return "not all servers arrived at the rendezvous"
        try:
            self._sender = Sender(
                join(self._rendezvous, self._groups.rank, collective_backend()),
                self._rendezvous,
                self._groups.rank,
                ops_by_receiver(self._assignment, self._groups.rank),
                dtype=self._shards.dtype,
                bucket_bytes=self._bucket_bytes,
                keeps_sent=self._full_every > 1,
            )
        except RuntimeError as error:
            return f"trainer rank {self._groups.rank} could not join: {error}"
        return None

    def _all_arrived(self, rendezvous: Rendezvous, answers: Sequence[Future[None]]) -> bool | None:
        """Waits for all workers and starts the rendezvous, or cancels it as soon as a server answers instead.

        Returns whether all have arrived, on the main rank.
        """
        if not self._groups.is_main:
            return None
        assert self._channel.store is not None
        missing = [arrival_key(rendezvous, number) for number in range(rendezvous.num_receivers)]
        while missing and not any(answer.done() for answer in answers):
            missing = [key for key in missing if not self._channel.store.check([key])]
            if missing:
                wait(answers, timeout=_POLL_SECONDS, return_when="FIRST_COMPLETED")
        answer_arrivals(self._channel.store, rendezvous, joining=not missing)
        return not missing

    def _send_shards(self, *, only_changes: bool) -> tuple[int, str | None]:
        """Sends this rank's part; returns its bytes, and the error if that fails."""
        assert self._sender is not None
        try:
            return self._sender.send(self._shards.tensors(), only_changes=only_changes), None
        except RuntimeError as error:
            return 0, f"trainer rank {self._groups.rank}: {error}"

    def _outcome(
        self, answers: Mapping[str, Future[None]], errors: Sequence[str]
    ) -> tuple[dict[str, TransferFailure], dict[str, list[Checksums]], float]:
        """Waits for the servers; returns failures, checksums (main rank only) and the seconds until the last answer."""
        start = time.perf_counter()
        failures, checksums = {}, {}
        for name, answer in answers.items():
            reports, failure = self._channel.answered(answer)
            if failure is None and errors:
                failure = TransferFailure(errors[0])
            if failure is not None:
                failures[name] = failure
            else:
                checksums[name] = [dict(report.checksums or {}) for report in reports]
        failures, seconds = self._groups.from_main((failures, time.perf_counter() - start))
        return failures, checksums, seconds

    def _leave(self) -> None:
        if self._sender is not None:
            self._sender.close()
        self._sender = None
        self._rendezvous = None

    def close(self) -> None:
        """Leaves the group."""
        self._leave()
