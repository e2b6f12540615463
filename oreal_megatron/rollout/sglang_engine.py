"""A RolloutEngine on SGLang servers."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import queue
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from oreal_megatron.config import SamplingConfig
from oreal_megatron.distributed.cpu_backend import free_cached_memory
from oreal_megatron.distributed.groups import ParallelGroups
from oreal_megatron.rollout.engine import units_by_prompt
from oreal_megatron.rollout.units import Generation, Outcome, Units
from oreal_megatron.servers.pool import ServerPool
from oreal_megatron.servers.request_queue import NoServerError
from oreal_megatron.servers.server import SGLangServer
from oreal_megatron.stopping import Stopped, StopRequest
from oreal_megatron.types import Completion, GenerationRequest
from oreal_megatron.weight_sync.publisher import Publisher
from oreal_megatron.weight_sync.types import PausedServer

T = TypeVar("T")

_HEARTBEAT_SECONDS = 2.0
"""Seconds between two looks of waiting ranks for a request to stop."""


class SGLangEngine:
    """See RolloutEngine. Servers start, or are attached to, at the first `publish`.

    The main process starts, updates and restarts the servers. The leading process of every model replica sends its own
    requests to them.
    """

    def __init__(
        self,
        pool: ServerPool,
        publisher: Publisher,
        groups: ParallelGroups,
        *,
        stop: StopRequest,
        timeout_seconds: float,
        shares_devices: bool = False,
    ):
        """Starts an event loop where this process leads a replica.

        stop: ends waits for servers. timeout_seconds: limit of the groups' collectives. shares_devices: whether servers
        take turns with the trainer on its devices.
        """
        self.weight_version = 0
        self._prepared_version: int | None = None
        self._shares_devices = shares_devices
        self._is_offloaded = False
        self.pool = pool
        self.publisher = publisher
        self._groups = groups
        self._stop = stop
        self.heartbeat_seconds = min(timeout_seconds / 4, _HEARTBEAT_SECONDS)
        """Seconds between two collectives of ranks that wait."""
        self._loop = _LoopThread() if groups.leads_replica else None

    def units(self, requests: Sequence[GenerationRequest]) -> list[list[int]]:
        """See RolloutEngine. A unit is the responses to one prompt."""
        return units_by_prompt(requests)

    def generate(
        self,
        units: Sequence[Sequence[GenerationRequest]],
        sampling: SamplingConfig,
        is_enough: Callable[[], bool] | None = None,
    ) -> Iterator[tuple[int, list[Completion]]]:
        """See RolloutEngine. A request to stop ends it, without the units that are unfinished.

        Raises:
            ValueError: A server refuses a prompt.
            NoServerError: No server is left.
        """
        finished: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        generation = None
        if self._loop is not None:
            generation = self._loop.run(self._generate(Units(units, finished.put), sampling, is_enough, None))
        try:
            while True:
                outcome = self._together(finished if generation is not None else None, until_stop=True)
                if outcome is None or not (outcome.no_current_weights or outcome.value):
                    return
                if outcome.no_current_weights:
                    self._resend_weights()
                else:
                    yield outcome.value
        finally:
            if generation is not None and self._loop is not None:
                generation.cancel()

    def start(
        self, sampling: SamplingConfig, is_enough: Callable[[], bool], report: Callable[[Outcome], None]
    ) -> Generation:
        """Has the servers generate while this thread does something else. Called by the leading process of a replica.

        Units are added to the generation that is returned. is_enough: see RolloutEngine; nothing else ends it, apart
        from an error and a cancellation. report: called on the event loop, for every unit with its position and its
        completions; at the end without a value, or with the error. It must not wait.
        """
        assert self._loop is not None
        more: asyncio.Queue[Sequence[Sequence[GenerationRequest]]] = asyncio.Queue()
        future = self._loop.run(self._generate(Units((), report), sampling, is_enough, more))
        loop = self._loop
        return Generation(future=future, add=lambda units: loop.call(lambda: more.put_nowait(units)))

    async def _generate(
        self,
        units: Units,
        sampling: SamplingConfig,
        is_enough: Callable[[], bool] | None,
        more: asyncio.Queue[Sequence[Sequence[GenerationRequest]]] | None,
    ) -> None:
        """Generates units, and those that `more` brings until `is_enough` is true; reports outcomes, and its end."""

        async def requests_of_more() -> list[GenerationRequest]:
            assert more is not None
            return units.add(await more.get())

        self.pool.on_no_current_weights = lambda: units.report(Outcome(no_current_weights=True))
        try:
            await self.pool.generate(
                units.requests, sampling, units.completed, is_enough, None if more is None else requests_of_more
            )
            units.report(Outcome())
        except Exception as error:
            units.report(Outcome(error=error))

    def prepare(self, weight_version: int) -> None:
        """Does the part of the next `publish` that is possible while servers generate. Every rank calls it.

        Raises:
            OSError: See Transport.
        """
        self.publisher.prepare(weight_version)
        self._prepared_version = weight_version

    def publish(self, weight_version: int) -> dict[str, float]:
        """See RolloutEngine. A server that is being restarted gets the weights later: see `_resend_weights`.

        Raises:
            Stopped: A stop was asked for while servers were waited for; none has the weights.
            NoServerError: No server is left; at the first publication, a server does not answer, cannot start, serves
                another model, or does not take the weights.
        """
        if self._prepared_version != weight_version:
            self.prepare(weight_version)
        self._prepared_version = None
        return self._deliver(weight_version, wait=False)

    @contextlib.contextmanager
    def generation_context(self, policy_on_device: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
        """See RolloutEngine.

        Raises:
            NoServerError: See `publish`.
        """
        if not self._shares_devices:
            with policy_on_device():
                yield
            return
        if self._is_offloaded:
            with policy_on_device():
                self.publish(self.weight_version)
        self._leave_devices()
        self._on_main(self.pool.onload)
        yield
        self.offload()

    def offload(self) -> None:
        """See RolloutEngine.

        Raises:
            NoServerError: No server is left.
        """
        if self._shares_devices and not self._is_offloaded:
            self._on_main(self.pool.offload)
            self._is_offloaded = True

    def _leave_devices(self) -> None:
        """Frees cached device memory on all ranks, before servers take it."""
        free_cached_memory()
        self._groups.barrier()

    def _resend_weights(self) -> None:
        """Publishes the current weights again, because no server has them and a server waits for them.

        Raises:
            NoServerError: The trainer cannot send weights in the middle of a step.
        """
        # Other replicas may have finished generating, so that not all ranks would take part.
        reason = "several data-parallel replicas" if self._groups.data_size > 1 else None
        if self._shares_devices:
            reason = "a trainer that has left its devices to the servers"
        if reason is not None:
            raise NoServerError(
                f"no rollout server has the current weights any more, and {reason} cannot send them in the middle of a "
                "step; start the run again: finished rollouts are in the journal. With more servers this is less likely"
            )
        self.resend(wait=True)

    def resend(self, *, wait: bool) -> None:
        """Publishes the current weights again. Every rank calls it.

        The policy still has these weights, and nothing is generated. wait: whether to wait for servers that start.

        Raises:
            Stopped, NoServerError: See `publish`.
        """
        self._deliver(self.weight_version, wait=wait)

    def _deliver(self, weight_version: int, *, wait: bool) -> dict[str, float]:
        """Updates all servers; a server that is alive and does not have the weights is sent to a second time.

        Returns the publication's metrics.

        Raises:
            Stopped: See `publish`.
        """
        start = time.perf_counter()
        if self._shares_devices:
            self._leave_devices()
            self._is_offloaded = False
        self._on_main(lambda: self.pool.connect(weight_version, wait=wait), until_stop=True)
        pool = self.pool
        label = self._groups.from_main(pool.label(weight_version))
        if self._loop is not None:
            self._loop.run(pool.announce(weight_version, label)).result()
        servers = self._on_main(pool.begin_update) or []
        report = {
            "publication/pause_seconds": time.perf_counter() - start,
            "publication/bytes": 0.0,
            "publication/failures": 0.0,
        }
        for is_last in (False, True):
            paused = [PausedServer(s.client, s.index, self._loop.run) for s in servers if self._loop]
            try:
                delivery = self.publisher.deliver(paused)
            except Exception as error:
                self._resume_after(error, servers)
                raise
            report["publication/bytes"] += delivery.num_bytes
            report["publication/failures"] += len(delivery.failures)
            for part, seconds in delivery.seconds.items():
                key = f"publication/{part}_seconds"
                report[key] = report.get(key, 0.0) + seconds
            again = {name for name, failure in delivery.failures.items() if not (failure.is_lost or is_last)}
            reasons = {name: failure.reason for name, failure in delivery.failures.items()}
            done = [server for server in servers if server.url not in again]
            start = time.perf_counter()
            self._on_main(lambda done=done, reasons=reasons: self.pool.finish_update(done, reasons))
            if not again:
                break
            servers = [server for server in servers if server.url in again]
        report["publication/continue_seconds"] = time.perf_counter() - start
        has_weights = self._groups.from_main(pool.has_weights)
        if self._loop is not None:
            is_main = self._groups.is_main
            resumed = pool.resume(label) if is_main else pool.follow(weight_version, label, has_weights)
            self._loop.run(resumed).result()
        self.weight_version = weight_version
        return report | {"publication/servers": float(sum(has_weights.values()))}

    def _resume_after(self, error: Exception, servers: Sequence[SGLangServer]) -> None:
        """Ends the update of servers after an error of the trainer, so that attached servers serve others again."""
        if servers and self._loop is not None:  # only the main process has paused any
            failures = {server.url: f"{type(error).__name__}: {error}" for server in servers}
            with contextlib.suppress(NoServerError):
                self._loop.run(self.pool.finish_update(servers, failures)).result()

    def _on_main(self, work: Callable[[], Coroutine[Any, Any, T]], *, until_stop: bool = False) -> T | None:
        """Runs `work` on the main process's event loop while other ranks wait; returns its result there, else None.

        until_stop: whether a request to stop cancels the work.

        Raises:
            Stopped: The work was cancelled.
        """
        outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        results: list[T] = []

        async def do() -> None:
            try:
                results.append(await work())
                outcomes.put(Outcome())
            except Exception as error:
                outcomes.put(Outcome(error=error))

        running = None
        if self._groups.is_main:
            assert self._loop is not None
            running = self._loop.run(do())
        if self._together(outcomes if running is not None else None, of_main=True, until_stop=until_stop) is None:
            if running is not None:
                running.cancel()
            raise Stopped("stopped while rollout servers were waited for; the same command goes on")
        return results[0] if results else None

    def _together(
        self, outcomes: queue.SimpleQueue[Outcome] | None, *, of_main: bool = False, until_stop: bool = False
    ) -> Outcome | None:
        """Returns the next outcome of the leading process, or raises its error, on every rank of the replica.

        outcomes: given on the leading process only. of_main: the main process has the outcome, for every rank.
        until_stop: return None once one of these ranks is asked to stop.
        Waiting ranks repeat short broadcasts, so that no collective exceeds its timeout however long the work takes,
        and a signal is noticed, whose handler cannot run inside a collective.

        Raises:
            LostPeer: Another rank of the job has failed, perhaps one of another replica.
        """
        broadcast = self._groups.from_main if of_main else self._groups.from_replica_leader
        any_of = self._groups.any_rank if of_main else self._groups.any_of_replica
        while True:
            outcome: Outcome | None = None
            if outcomes is not None:
                with contextlib.suppress(queue.Empty):
                    outcome = outcomes.get(timeout=self.heartbeat_seconds)
            outcome = broadcast(outcome)
            if outcome is not None and outcome.error is not None:
                raise outcome.error
            if outcome is not None:
                return outcome
            self._groups.check_others()
            if until_stop and any_of(self._stop.is_made):
                return None

    def close(self) -> None:
        if self._loop is not None:
            self._loop.run(_cancel_others()).result()  # or a task restarts a server that is ended now
            self._loop.run(self.pool.close()).result()
            self._loop.stop()
            self._loop = None
        self.publisher.close()


async def _cancel_others() -> None:
    """Cancels all other tasks of this loop."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


class _LoopThread:
    """An event loop in a thread that runs until `stop`; launched servers end with this thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rollout-servers", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def call(self, function: Callable[[], None]) -> None:
        """Has the loop call a function, after those of earlier calls."""
        self._loop.call_soon_threadsafe(function)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
