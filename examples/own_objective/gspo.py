"""Clipped ratios of whole responses: Group Sequence Policy Optimization (arXiv 2507.18071).

The paper's mean is over responses; the trainer's, over tokens, gives long responses more weight.
"""

import torch
from pydantic import BaseModel


class Clip(BaseModel):
    """Limits of a sequence's ratio: 1 - low to 1 + high."""

    low: float = 3e-4
    high: float = 4e-4


def policy_loss(*, logprobs_R, rollout_logprobs_R, advantages_R, lengths, settings: Clip, **_):
    """Returns fp32 [R]: the loss of a response, at each of its tokens."""
    per_response = (logprobs_R - rollout_logprobs_R).split(lengths)
    ratio_R = torch.cat([logprobs_R[:0], *(part.mean().exp().expand(len(part)) for part in per_response)])
    clipped_R = ratio_R.clamp(1 - settings.low, 1 + settings.high)
    return -torch.minimum(ratio_R * advantages_R, clipped_R * advantages_R)
