"""A RolloutEngine on SGLang servers."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import queue
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from oreal_megatron.config import SamplingConfig
from oreal_megatron.parallel.groups import ParallelGroups
from oreal_megatron.rollout.client import ServerClient
from oreal_megatron.rollout.engine import Completion, GenerationRequest
from oreal_megatron.rollout.fleet import Fleet, Weights

T = TypeVar("T")


class WeightTransport(Protocol):
    """A way for the policy's weights to reach servers."""

    def prepare(self, weight_version: int) -> None:
        """Every rank, while servers still generate: what can be done before they pause."""

    @property
    def start_from(self) -> Path:
        """A Hugging Face directory that servers can start from, after the first `prepare`."""

    @property
    def start_is_current(self) -> bool:
        """Whether `start_from` holds the weights of the last `prepare`."""

    async def load(self, server: ServerClient) -> None:
        """Main rank, the server is paused: it takes the weights of the last `prepare`."""


class SGLangEngine:
    """See RolloutEngine. Servers start, or are attached to, at the first `publish`.

    The main process owns the servers: it starts, publishes to and restarts them. The leading process of every model
    replica asks them for its own responses.
    """

    def __init__(
        self,
        fleet: Fleet,
        transport: WeightTransport,
        groups: ParallelGroups,
        *,
        vocab_size: int,
        timeout_seconds: float,
    ):
        """vocab_size: token ids of prompts must be below it. timeout_seconds: of the groups' collectives."""
        self.weight_version = 0
        self._fleet = fleet
        self._transport = transport
        self._groups = groups
        self._vocab_size = vocab_size
        self._heartbeat_seconds = timeout_seconds / 4
        self._loop = _LoopThread() if groups.leads_replica else None

    def units(self, requests: Sequence[GenerationRequest]) -> list[list[int]]:
        """See RolloutEngine: the responses to one prompt."""
        by_prompt: dict[tuple[int, ...], list[int]] = {}
        for index, request in enumerate(requests):
            by_prompt.setdefault(request.prompt_ids, []).append(index)
        return list(by_prompt.values())

    def generate(
        self,
        units: Sequence[Sequence[GenerationRequest]],
        sampling: SamplingConfig,
        is_enough: Callable[[], bool] | None = None,
    ) -> Iterator[tuple[int, list[Completion]]]:
        """See RolloutEngine.

        Raises:
            ValueError: a prompt has a token id that the model has no embedding for (it would end the server), or the
                servers refuse it.
            NoServerError: no server is left.
        """
        self._check_vocabulary(units)
        finished: queue.SimpleQueue[_Outcome] = queue.SimpleQueue()
        work = None
        if self._loop is not None:
            work = self._loop.run(self._generate(units, sampling, is_enough, finished))
        try:
            while (outcome := self._together(finished if work is not None else None)).value is not None:
                yield outcome.value
        finally:
            if work is not None:
                work.cancel()

    async def _generate(
        self,
        units: Sequence[Sequence[GenerationRequest]],
        sampling: SamplingConfig,
        is_enough: Callable[[], bool] | None,
        finished: queue.SimpleQueue[_Outcome],
    ) -> None:
        """Puts every unit into `finished` when it is; then an outcome without a value, or the error."""
        unit_of = [(position, place) for position, unit in enumerate(units) for place in range(len(unit))]
        parts: list[list[Completion | None]] = [[None] * len(unit) for unit in units]

        def completed(index: int, completion: Completion) -> None:
            position, place = unit_of[index]
            parts[position][place] = completion
            if None not in parts[position]:
                finished.put(_Outcome(value=(position, parts[position])))

        try:
            requests = [request for unit in units for request in unit]
            await self._fleet.generate(requests, sampling, completed, is_enough)
            finished.put(_Outcome())
        except Exception as error:
            finished.put(_Outcome(error=error))

    def _check_vocabulary(self, units: Sequence[Sequence[GenerationRequest]]) -> None:
        for request in (request for unit in units for request in unit):
            unknown = [token for token in request.prompt_ids if not 0 <= token < self._vocab_size]
            if unknown:
                raise ValueError(
                    f"a prompt has token id {unknown[0]}, the model's vocabulary ends at {self._vocab_size - 1}: "
                    "model.tokenizer and model.path do not belong together"
                )

    def publish(self, weight_version: int) -> None:
        """See RolloutEngine.

        Raises:
            NoServerError: no server has the weights; of the first ones, a server does not answer, cannot start or is
                another model's.
        """
        self._transport.prepare(weight_version)
        self._groups.barrier()
        outcomes: queue.SimpleQueue[_Outcome] = queue.SimpleQueue()
        if self._groups.is_main:
            assert self._loop is not None
            weights = Weights(
                version=weight_version,
                label=self._fleet.label(weight_version),
                load=self._transport.load,
                start_from=self._transport.start_from,
                is_whole=self._transport.start_is_current,
            )
            self._loop.run(self._publish(weights, outcomes))
        label, urls = self._together(outcomes if self._groups.is_main else None, of_main=True).value
        if self._loop is not None and not self._groups.is_main:
            self._loop.run(self._fleet.follow(weight_version, label, urls)).result()
        self.weight_version = weight_version

    async def _publish(self, weights: Weights, outcomes: queue.SimpleQueue[_Outcome]) -> None:
        try:
            await self._fleet.publish(weights)
            outcomes.put(_Outcome(value=(weights.label, [member.client.url for member in self._fleet.members])))
        except Exception as error:
            outcomes.put(_Outcome(error=error))

    def _together(self, outcomes: queue.SimpleQueue[_Outcome] | None, *, of_main: bool = False) -> _Outcome:
        """The next outcome that the leading process has (`outcomes` is given there), or its error, on every rank of the
        replica; of_main: that the main process has, on every rank.

        The others wait in short broadcasts, so that no collective outlives its timeout however long the work takes.
        """
        broadcast = self._groups.from_main if of_main else self._groups.from_replica_leader
        while True:
            outcome: _Outcome | None = None
            if outcomes is not None:
                with contextlib.suppress(queue.Empty):
                    outcome = outcomes.get(timeout=self._heartbeat_seconds)
            outcome = broadcast(outcome)
            if outcome is not None and outcome.error is not None:
                raise outcome.error
            if outcome is not None:
                return outcome

    def close(self) -> None:
        if self._loop is not None:
            self._loop.run(self._fleet.close()).result()
            self._loop.stop()
            self._loop = None


@dataclass(frozen=True)
class _Outcome:
    value: Any = None
    error: Exception | None = None


class _LoopThread:
    """An event loop in a thread that lives until `stop`; launched servers end with this thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rollout-servers", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
