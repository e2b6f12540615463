"""A ratio that is bounded smoothly: its gain goes to a limit, where a clipped ratio has no gradient at once."""

from pydantic import BaseModel, PositiveFloat


class SoftClip(BaseModel):
    """Largest distance of the bounded ratio from 1."""

    limit: PositiveFloat = 0.2


def policy_loss(*, logprobs_R, rollout_logprobs_R, weights_R, advantages_R, settings: SoftClip, **_):
    """Returns fp32 [R]: the loss of each token."""
    ratio_R = (logprobs_R - rollout_logprobs_R).exp()
    bounded_R = 1 + settings.limit * ((ratio_R - 1) / settings.limit).tanh()
    return -weights_R * advantages_R * bounded_R
