"""Limits of single responses by a function of one's own: how long each may become, and what else ends it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from oreal_megatron.config import RolloutSamplingConfig
from oreal_megatron.extensions import sampling_function
from oreal_megatron.types import Prompt


@dataclass(frozen=True, kw_only=True)
class ResponseLimits:
    """Limits of a response, in addition to those of the configuration."""

    max_new_tokens: int | None = None
    """Longest response, in tokens; None: rollout.sampling.max_new_tokens."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end the response, in addition to the policy's stop token."""
    source: str = ""
    """The function, its prompt and sample index, for messages."""


LimitsOf = Callable[[Prompt, int], ResponseLimits]
"""(prompt, sample index) -> limits of the response."""


def no_limits(prompt: Prompt, sample_index: int) -> ResponseLimits:
    """Returns the limits of the configuration alone."""
    return ResponseLimits()


def limits_of_step(sampling: RolloutSamplingConfig, step: int) -> LimitsOf:
    """Returns what gives the limits of a step's responses: by `rollout.sampling.function`, if there is one.

    What is returned raises ValueError where the function raises, or returns something else than limits within those of
    the configuration.
    """
    function, config = sampling_function(sampling), sampling.function
    if function is None or config is None:
        return no_limits

    def limits_of(prompt: Prompt, sample_index: int) -> ResponseLimits:
        limits = function(prompt=prompt, sample_index=sample_index, step=step, sampling=sampling)
        source = f"rollout.sampling.function = {config.path} for response {sample_index} to prompt {prompt.id}"
        return _checked(limits, sampling.max_new_tokens, source)

    return limits_of


def _checked(limits: Any, longest: int, source: str) -> ResponseLimits:
    """Returns the limits that a function returned. Raises ValueError where they are none."""
    if not isinstance(limits, Mapping):
        raise ValueError(f"{source} returned {limits!r}; return a dict, which may be empty")
    known = ("max_new_tokens", "stop_token_ids")
    if unknown := [key for key in limits if key not in known]:
        raise ValueError(
            f"{source} returned the key {unknown[0]!r} with the value {limits[unknown[0]]!r}; a response may have "
            f"{' and '.join(known)} of its own"
        )
    max_new_tokens = limits.get("max_new_tokens")
    if max_new_tokens is not None and not (_is_integer(max_new_tokens) and 1 <= max_new_tokens <= longest):
        raise ValueError(
            f"{source} returned max_new_tokens = {max_new_tokens!r}; return an integer from 1 to "
            f"rollout.sampling.max_new_tokens = {longest}, which memory is planned for"
        )
    stop_token_ids = limits.get("stop_token_ids", ())
    if not (isinstance(stop_token_ids, list | tuple) and all(map(_is_integer, stop_token_ids))):
        raise ValueError(f"{source} returned stop_token_ids = {stop_token_ids!r}; return a list of token ids")
    return ResponseLimits(max_new_tokens=max_new_tokens, stop_token_ids=tuple(stop_token_ids), source=source)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
