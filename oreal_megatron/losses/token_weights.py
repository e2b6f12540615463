"""Token weights from the reward model's scores: equation (10), its general form and the top-k variant.

Shapes: T response tokens of one sequence, in order. All fp32; weights carry no gradient.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from oreal_megatron.config import TokenWeightConfig


def token_weights(scores_T: Tensor, *, correct: bool, config: TokenWeightConfig) -> Tensor:
    """Returns the weight of every response token of a sequence, fp32 [T], at least 0.

    With s the scores of a correct response, and minus the scores of an incorrect one, m_t the mean of s_1..s_t and
    c_t = sigmoid(m_t), `config.form` gives

    confidence  clamp((c_t - th) / (1 - th), 0, 1); at th = 1/2 that is max(2 c_t - 1, 0), eq. (10)
    change      max(c_t - c_(t-1), 0), with c_0 = 1/2
    departure   max(s_t - m_(t-1), 0), with m_0 = 0

    scores_T: fp32 [T], aligned: index t holds the score that stands for token t.
    """
    if config.source == "ones":
        return torch.ones_like(scores_T)
    scores = scores_T.detach().double() * (1.0 if correct else -1.0)
    means = scores.cumsum(0) / torch.arange(1, len(scores) + 1, dtype=scores.dtype, device=scores.device)
    confidence = torch.sigmoid(means)
    if config.form == "change":
        weights = torch.diff(confidence, prepend=confidence.new_tensor([0.5])).clamp(min=0.0)
    elif config.form == "departure":
        weights = torch.cat([scores[:1], scores[1:] - means[:-1]]).clamp(min=0.0)
    elif config.top_share is not None:
        weights = _top_share(confidence, config.top_share)
    else:
        threshold = config.positive_threshold if correct else config.negative_threshold
        weights = ((confidence - threshold) / (1.0 - threshold)).clamp(0.0, 1.0)
    if config.normalize == "mean" and weights.sum() > 0:
        weights = weights / weights.mean()
    return (config.floor + (1.0 - config.floor) * weights).float()


def _top_share(confidence_T: Tensor, share: float) -> Tensor:
    """Rescales the top share of positions to [0, 1] by its minimum and maximum; the other positions get 0.

    Where all values of the top share are equal, their weights are 1.
    """
    num_kept = max(1, math.ceil(share * len(confidence_T)))
    values, indices = confidence_T.topk(num_kept)
    spread = values.max() - values.min()
    rescaled = (values - values.min()) / spread if spread > 0 else torch.ones_like(values)
    return torch.zeros_like(confidence_T).index_copy(0, indices, rescaled)
