"""What a rollout engine is: token ids in, token ids and log-probabilities out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from oreal_megatron.config import SamplingConfig
from oreal_megatron.records import FinishReason


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One response to generate."""

    prompt_ids: tuple[int, ...]
    seed: int
    """Fixes the response's randomness, whatever it is batched with."""
    max_new_tokens: int


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One generated response."""

    token_ids: tuple[int, ...]
    """The stop token included where there is one."""
    logprobs: tuple[float, ...]
    """Nats: log softmax(logits / temperature) of each token, before top-p; at temperature 0, of the plain logits."""
    finish_reason: FinishReason
    weight_version: int


class RolloutEngine(Protocol):
    """Generates with the weights of the last `publish`."""

    weight_version: int
    """Of the last `publish`; 0 before the first."""

    def units(self, requests: Sequence[GenerationRequest]) -> list[list[int]]:
        """Indices of the requests that are generated, journalled and, after a kill, repeated as one.

        Depends on the requests alone, so that a restarted run finds the same units, on any layout.
        """

    def generate(
        self, units: Sequence[Sequence[GenerationRequest]], sampling: SamplingConfig
    ) -> Iterator[tuple[int, list[Completion]]]:
        """(index of the unit, one completion a request in order), as units finish.

        All ranks of a model replica call it with the same units and get all of them; other replicas have others.
        """

    def publish(self, weight_version: int) -> Mapping[str, float]:
        """From now on generate with the policy's present weights, stamped `weight_version`.

        Every rank calls it. Returns what a step's report shall say of it.
        """

    def close(self) -> None:
        """Ends whatever the engine started."""
