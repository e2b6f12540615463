"""A RolloutEngine on SGLang servers. The trainer's main process talks to them; every rank gets their answers."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Coroutine, Sequence
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
    """See RolloutEngine. Servers start, or are attached to, at the first `publish`."""

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
        self._fleet = fleet
        self._transport = transport
        self._groups = groups
        self._vocab_size = vocab_size
        self._heartbeat_seconds = timeout_seconds / 4
        self._loop = _LoopThread() if groups.is_main else None

    def generate(self, requests: Sequence[GenerationRequest], sampling: SamplingConfig) -> list[Completion]:
        """See RolloutEngine.

        Raises:
            ValueError: a prompt has a token id that the model has no embedding for (it would end the server), or the
                servers refuse it.
            NoServerError: no server is left.
        """
        for request in requests:
            unknown = [token for token in request.prompt_ids if not 0 <= token < self._vocab_size]
            if unknown:
                raise ValueError(
                    f"a prompt has token id {unknown[0]}, the model's vocabulary ends at {self._vocab_size - 1}: "
                    "model.tokenizer and model.path do not belong together"
                )
        return self._on_main(lambda: self._fleet.generate(requests, sampling))

    def publish(self, weight_version: int) -> None:
        """See RolloutEngine.

        Raises:
            NoServerError: no server has the weights; of the first ones, a server does not answer, cannot start or is
                another model's.
        """
        self._transport.prepare(weight_version)
        self._groups.barrier()
        self._on_main(lambda: self._fleet.publish(self._weights(weight_version)))

    def close(self) -> None:
        if self._loop is not None:
            self._loop.run(self._fleet.close()).result()
            self._loop.stop()
            self._loop = None

    def _weights(self, version: int) -> Weights:
        return Weights(
            version=version,
            label=self._fleet.label(version),
            load=self._transport.load,
            start_from=self._transport.start_from,
            is_whole=self._transport.start_is_current,
        )

    def _on_main(self, start: Any) -> Any:
        """Runs a coroutine on the main rank; its result, or its error, on every rank.

        The others wait in short broadcasts, so that no collective outlives its timeout however long the work takes.
        """
        future = self._loop.run(start()) if self._loop is not None else None
        while True:
            outcome: _Outcome | None = None
            if future is not None:
                concurrent.futures.wait([future], timeout=self._heartbeat_seconds)
                outcome = _Outcome.of(future) if future.done() else None
            outcome = self._groups.from_main(outcome)
            if outcome is not None:
                return outcome.unwrap()


@dataclass(frozen=True)
class _Outcome:
    value: Any = None
    error: BaseException | None = None

    @classmethod
    def of(cls, future: concurrent.futures.Future[Any]) -> _Outcome:
        error = future.exception()
        return cls(error=error) if error is not None else cls(value=future.result())

    def unwrap(self) -> Any:
        if self.error is not None:
            raise self.error
        return self.value


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
