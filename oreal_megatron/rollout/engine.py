"""What a rollout engine is: token ids in, token ids and log-probabilities out."""

from __future__ import annotations

from collections.abc import Sequence
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

    def generate(self, requests: Sequence[GenerationRequest], sampling: SamplingConfig) -> list[Completion]:
        """One completion a request, in order. Every rank calls it with the same requests and gets them all."""

    def publish(self, weight_version: int) -> None:
        """From now on generate with the policy's present weights, stamped `weight_version`."""

    def close(self) -> None:
        """Ends whatever the engine started."""
