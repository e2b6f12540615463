"""Losses and advantages of published objectives, as functions of `objective.functions`; conf/objective has the presets.

Shapes: R response tokens of a micro-batch. All fp32; log-probabilities in nats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from oreal_megatron.losses.advantages import standardized
from oreal_megatron.types import GradedRollout

Positive = Annotated[float, Field(gt=0.0)]


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ClipRange(_Settings):
    """Limits of a ratio: 1 - low to 1 + high."""

    low: Annotated[float, Field(ge=0.0, le=1.0)]
    high: Positive


class CappedWeight(_Settings):
    """Upper limit of an importance weight: 1 + high."""

    high: Positive


class Overlong(_Settings):
    """Lengths of responses, in tokens, between which the reward falls by 1."""

    max_tokens: Positive
    """Length of the longest response that is generated."""
    buffer_share: Annotated[float, Field(gt=0.0, le=1.0)]
    """Share of max_tokens, at its end, over which the reward falls."""
    epsilon: Annotated[float, Field(ge=0.0)] = 1e-6
    """Number added to the standard deviation."""


def clip_higher(
    *,
    logprobs_R: Tensor,
    rollout_logprobs_R: Tensor,
    weights_R: Tensor,
    advantages_R: Tensor,
    settings: ClipRange,
    **_: Any,
) -> Tensor:
    """Returns PPO's clipped loss with limits of its own above and below (DAPO, arXiv 2503.14476)."""
    ratio_R = (logprobs_R - rollout_logprobs_R).exp()
    return _clipped(ratio_R, weights_R * advantages_R, settings)


def sequence_ratio(
    *,
    logprobs_R: Tensor,
    rollout_logprobs_R: Tensor,
    weights_R: Tensor,
    advantages_R: Tensor,
    lengths: Sequence[int],
    settings: ClipRange,
    **_: Any,
) -> Tensor:
    """Returns the clipped loss of whole responses, at each of their tokens (GSPO, arXiv 2507.18071).

    The ratio of a response is the geometric mean over its tokens. The paper's mean is over responses; here a preset's
    `denominators` decide.
    """
    parts = (logprobs_R - rollout_logprobs_R).split(list(lengths))
    ratio_R = torch.cat([logprobs_R[:0], *(part.mean().exp().expand(len(part)) for part in parts)])
    return _clipped(ratio_R, weights_R * advantages_R, settings)


def capped_importance(
    *,
    logprobs_R: Tensor,
    detached_logprobs_R: Tensor,
    rollout_logprobs_R: Tensor,
    weights_R: Tensor,
    advantages_R: Tensor,
    settings: CappedWeight,
    **_: Any,
) -> Tensor:
    """Returns -min(ratio, 1 + high) A log pi, without a gradient of the ratio (CISPO, arXiv 2506.13585).

    Every token keeps its gradient, where a clipped ratio has none.
    """
    ratio_R = (detached_logprobs_R - rollout_logprobs_R).exp().clamp(max=1.0 + settings.high)
    return -ratio_R * weights_R * advantages_R * logprobs_R


def centred(*, responses: Sequence[GradedRollout]) -> list[float]:
    """Returns each reward less the group's mean, not divided by its spread (Dr. GRPO, arXiv 2503.20783).

    The reward is 1 at full credit and 0 at none.
    """
    mean = math.fsum(graded.credit for graded in responses) / len(responses)
    return [graded.credit - mean for graded in responses]


def overlong_shaped(*, responses: Sequence[GradedRollout], settings: Overlong) -> list[float]:
    """Returns GRPO's advantages of rewards that fall for overlong responses (DAPO, arXiv 2503.14476).

    The reward is 1 or -1, or between them with partial credit; from max_tokens (1 - buffer_share) tokens on it falls
    linearly, by 1 at max_tokens.
    """
    buffer = settings.max_tokens * settings.buffer_share
    rewards = []
    for graded in responses:
        beyond = graded.rollout.num_response_tokens - (settings.max_tokens - buffer)
        rewards.append(2.0 * graded.credit - 1.0 - min(max(beyond / buffer, 0.0), 1.0))
    return standardized(rewards, epsilon=settings.epsilon)


def _clipped(ratio_R: Tensor, advantages_R: Tensor, limits: ClipRange) -> Tensor:
    clipped_R = ratio_R.clamp(1.0 - limits.low, 1.0 + limits.high)
    return -torch.minimum(ratio_R * advantages_R, clipped_R * advantages_R)
