"""What a rollout engine is: token ids in, token ids and log-probabilities out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from oreal_megatron.config import SamplingConfig
from oreal_megatron.records import FinishReason, WeightSpan


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One generated response, or its beginning."""

    token_ids: tuple[int, ...]
    """The stop token included where there is one."""
    logprobs: tuple[float, ...]
    """Nats: log softmax(logits / temperature) of each token, before top-p; at temperature 0, of the plain logits."""
    finish_reason: FinishReason | None
    """None: it was broken off, and can go on from there."""
    weight_spans: tuple[WeightSpan, ...]
    """Which weights generated which tokens."""

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "weight_spans": [dict(vars(span)) for span in self.weight_spans]}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Completion:
        """The inverse of `to_json`. Raises KeyError, TypeError or ValueError."""
        reason = record["finish_reason"]
        return cls(
            token_ids=tuple(record["token_ids"]),
            logprobs=tuple(record["logprobs"]),
            finish_reason=None if reason is None else FinishReason(reason),
            weight_spans=tuple(WeightSpan(**span) for span in record["weight_spans"]),
        )


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One response to generate."""

    prompt_ids: tuple[int, ...]
    seed: int
    """Fixes the response's randomness, whatever it is batched with."""
    max_new_tokens: int
    """Of the whole response."""
    begun: Completion | None = None
    """What an earlier step has of the response, which goes on from there; a finished one is the answer."""


class RolloutEngine(Protocol):
    """Generates with the weights of the last `publish`."""

    weight_version: int
    """Of the last `publish`; 0 before the first."""

    def units(self, requests: Sequence[GenerationRequest]) -> list[list[int]]:
        """Indices of the requests that are generated, journalled and, after a kill, repeated as one.

        Depends on the requests alone, so that a restarted run finds the same units, on any layout.
        """

    def generate(
        self,
        units: Sequence[Sequence[GenerationRequest]],
        sampling: SamplingConfig,
        is_enough: Callable[[], bool] | None = None,
    ) -> Iterator[tuple[int, list[Completion]]]:
        """(index of the unit, one completion a request in order), as units finish.

        All ranks of a model replica call it with the same units and get all of them; other replicas have others.
        is_enough: asked now and then, from any thread, on the leading process of each replica; once it is true what is
        under way is broken off, and units come as they are then.
        """

    def publish(self, weight_version: int) -> Mapping[str, float]:
        """From now on generate with the policy's present weights, which are on the devices, stamped `weight_version`.

        Every rank calls it. Returns what a step's report shall say of it.
        """

    def awake(self, policy_on_device: Callable[[], AbstractContextManager[None]]) -> AbstractContextManager[None]:
        """What `generate` is called in, by every rank.

        policy_on_device: brings the policy's weights, which are those of the last `publish`, to the devices. An engine
        with devices of its own, or none, has them there all the time; one that takes turns with the trainer on its
        devices has them there while it takes them, and gives everything back in the end.
        """

    def rest(self) -> None:
        """Gives the trainer's devices back, where a `publish` has taken them. Every rank calls it."""

    def close(self) -> None:
        """Ends whatever the engine started."""
