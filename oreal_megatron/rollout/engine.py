"""The protocol of rollout engines: token ids in, token ids and log-probabilities out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from oreal_megatron.config import SamplingConfig
from oreal_megatron.types import Completion, GenerationRequest, positions_by


class ResponseGenerator(Protocol):
    """Generates responses with one version of the weights."""

    @property
    def weight_version(self) -> int:
        """Version of the weights; 0 before the first publication."""

    def units(self, requests: Sequence[GenerationRequest]) -> list[list[int]]:
        """Cuts requests into units, which are generated, journalled and, after a kill, repeated as a whole.

        Returns the indices of each unit's requests. They depend on the requests alone, so that a restarted run finds
        the same units, on any layout.
        """

    def generate(
        self,
        units: Sequence[Sequence[GenerationRequest]],
        sampling: SamplingConfig,
        is_enough: Callable[[], bool] | None = None,
    ) -> Iterator[tuple[int, list[Completion]]]:
        """Yields (index of a unit, a completion per request in order) as units finish.

        All ranks of a model replica call it with the same units and get all of them; other replicas have other units.
        is_enough: asked now and then, from any thread, on the leading process of each replica. Once it is true,
        generation is broken off, and the remaining units are yielded with unfinished completions.
        """


class RolloutEngine(ResponseGenerator, Protocol):
    """An engine that generates with the weights of the last `publish`."""

    def publish(self, weight_version: int) -> Mapping[str, float]:
        """Takes the policy's present weights, which are on the devices, as version `weight_version`.

        Every rank calls it. Returns metrics for the step's report.
        """

    def generation_context(
        self, policy_on_device: Callable[[], AbstractContextManager[None]]
    ) -> AbstractContextManager[None]:
        """Context in which `generate` may be called; every rank enters it.

        policy_on_device: brings the policy's weights, which are those of the last `publish`, to the devices. An engine
        that generates with the policy itself keeps them there inside the context; an engine that shares the trainer's
        devices does so while it loads them, and frees its memory on leaving.
        """

    def offload(self) -> None:
        """Frees the memory that a `publish` has taken on the trainer's devices. Every rank calls it."""

    def close(self) -> None:
        """Ends the processes and connections of the engine."""


def units_by_prompt(requests: Sequence[GenerationRequest]) -> list[list[int]]:
    """Returns the indices of the requests for each prompt, in the order of the prompts' first requests."""
    return positions_by(request.prompt_ids for request in requests)
