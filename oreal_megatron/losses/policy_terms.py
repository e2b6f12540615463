"""Loss terms of equations (11) and (12), and of the baselines.

Every term is a sum without a denominator: the trainer divides once, by counts over the whole step that are known
before the first forward pass. Shapes: R response tokens of a micro-batch, N sequences. All fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from oreal_megatron.config import ObjectiveConfig
from oreal_megatron.extensions import described, objective_function
from oreal_megatron.types import positions_by


@dataclass(frozen=True)
class TokenCounts:
    """Numbers of response tokens that the step trains on, over all ranks and micro-batches."""

    correct: int
    incorrect: int
    limit: int
    """Number of tokens that its responses could have had."""

    @property
    def all(self) -> int:
        return self.correct + self.incorrect

    def of_positive(self, config: ObjectiveConfig) -> int:
        """Returns the positive term's denominator, at least 1."""
        return max(self.correct if config.denominators == "by_outcome" else self._of_all(config), 1)

    def of_negative(self, config: ObjectiveConfig) -> int:
        """Returns the negative term's denominator, at least 1."""
        return max(self.incorrect if config.denominators == "by_outcome" else self._of_all(config), 1)

    def of_kl(self, config: ObjectiveConfig) -> int:
        """Returns the KL term's denominator, at least 1."""
        return max(self._of_all(config), 1)

    def _of_all(self, config: ObjectiveConfig) -> int:
        return self.limit if config.denominators == "token_limit" else self.all


@dataclass(frozen=True)
class PolicyTerms:
    """Terms of the policy's loss as sums over a micro-batch: differentiable scalars."""

    positive: Tensor
    negative: Tensor
    kl: Tensor
    """Sum of the KL penalty, without beta."""

    def loss(self, counts: TokenCounts, config: ObjectiveConfig) -> Tensor:
        """Returns the micro-batch's share of `positive + eta * negative + beta * KL`, each over its global count."""
        return (
            self.positive / counts.of_positive(config)
            + config.eta * self.negative / counts.of_negative(config)
            + config.beta * self.kl / counts.of_kl(config)
        )


def policy_terms(
    config: ObjectiveConfig,
    *,
    logprobs_R: Tensor,
    reference_logprobs_R: Tensor,
    rollout_logprobs_R: Tensor,
    weights_R: Tensor,
    advantages_R: Tensor,
    correct_R: Tensor,
    lengths: Sequence[int],
    old_logprobs_R: Tensor | None = None,
    detached_logprobs_R: Tensor | None = None,
) -> PolicyTerms:
    """Returns the policy's terms over the response tokens of a micro-batch.

    positive  -A weight log pi         or  -A weight ratio      summed over tokens of correct responses
    negative  the same over tokens of incorrect responses       (eq. 11 uses log pi above and the ratio here)
              both times `importance_weights` where config.importance_limit is set, and without the tokens outside of
              config.importance_token_band and importance_response_band
    kl        kl_penalty(reference, policy)                     summed over all tokens

    A function of `objective.functions` takes the place of the first two, or of kl_penalty.

    logprobs_R (with gradient), reference_logprobs_R, rollout_logprobs_R: nats. weights_R: [0, 1].
    advantages_R: the response's A at each of its tokens. correct_R: bool. lengths: tokens of each response, in order.
    old_logprobs_R: the policy's log-probabilities before the step's first update; None: this is the first update.
    detached_logprobs_R: the values of logprobs_R as a constant; None: logprobs_R without its gradient.

    Raises:
        ValueError: a function returned something else than a finite loss for each token.
    """
    now_R = logprobs_R.detach() if detached_logprobs_R is None else detached_logprobs_R
    old_R = now_R if old_logprobs_R is None else old_logprobs_R
    own_loss = objective_function(config, "policy_loss")
    if own_loss is not None:
        loss_R = own_loss(
            logprobs_R=logprobs_R,
            old_logprobs_R=old_R,
            detached_logprobs_R=now_R,
            rollout_logprobs_R=rollout_logprobs_R,
            weights_R=weights_R,
            advantages_R=advantages_R,
            correct_R=correct_R,
            lengths=tuple(lengths),
        )
        _check_by_token(loss_R, logprobs_R, described(config, "policy_loss"))
        forms = {"logprob": loss_R, "ratio": loss_R}
    else:
        forms = _forms(config, logprobs_R, old_R, rollout_logprobs_R, weights_R, advantages_R)
    within_R = within_bands(config, (old_R - rollout_logprobs_R).detach(), lengths)
    positive = forms[config.positive_term][correct_R & within_R].sum()
    negative = forms[config.negative_term][~correct_R & within_R].sum()
    own_kl = objective_function(config, "kl")
    if own_kl is not None:
        penalty_R = own_kl(reference_logprobs_R=reference_logprobs_R, logprobs_R=logprobs_R)
        _check_by_token(penalty_R, logprobs_R, described(config, "kl"))
    else:
        penalty_R = kl_penalty(reference_logprobs_R, logprobs_R, config.kl_type)
    if not config.kl_on_correct:
        penalty_R = penalty_R[~correct_R]
    return PolicyTerms(positive=positive, negative=negative, kl=penalty_R.sum())


def _forms(
    config: ObjectiveConfig,
    logprobs_R: Tensor,
    old_R: Tensor,
    rollout_logprobs_R: Tensor,
    weights_R: Tensor,
    advantages_R: Tensor,
) -> dict[str, Tensor]:
    """Returns the losses [R] of tokens by both forms, `logprob` and `ratio`."""
    behaviour_R = old_R if config.ratio_reference == "self" else rollout_logprobs_R
    ratio_R = (logprobs_R - behaviour_R).exp()
    scale_R = -advantages_R * weights_R
    if config.importance_limit is not None:
        scale_R = scale_R * importance_weights(old_R, rollout_logprobs_R, config.importance_limit)
    if config.clip is None:
        by_ratio_R = scale_R * ratio_R
    else:
        clipped_R = ratio_R.clamp(1.0 - config.clip, 1.0 + config.clip)
        by_ratio_R = torch.maximum(scale_R * ratio_R, scale_R * clipped_R)
    return {"logprob": scale_R * logprobs_R, "ratio": by_ratio_R}


def _check_by_token(values: object, logprobs_R: Tensor, what: str) -> None:
    """Raises ValueError where a user's function returned something else than a float tensor like the tokens."""
    if not isinstance(values, Tensor) or values.shape != logprobs_R.shape or not values.is_floating_point():
        found = f"{values.dtype} of shape {list(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"{what} returned {found}; return a value for each token, of shape {list(logprobs_R.shape)}")


def importance_weights(old_logprobs_R: Tensor, rollout_logprobs_R: Tensor, limit: float) -> Tensor:
    """Returns min(pi / pi_rollout, limit) of each token, which corrects for tokens that another policy drew.

    Truncation bounds the variance, at the price of a bias. The weights carry no gradient.
    old_logprobs_R: the policy's log-probabilities before the step's first update, in nats, without a gradient.
    """
    return (old_logprobs_R - rollout_logprobs_R).exp().clamp(max=limit)


def within_bands(config: ObjectiveConfig, differences_R: Tensor, lengths: Sequence[int]) -> Tensor:
    """Returns which tokens have policy terms by the bands of importance ratios, bool [R].

    differences_R: log pi - log pi_rollout in nats, pi before the update. lengths: tokens of each response, in order.
    """
    within_R = torch.ones_like(differences_R, dtype=torch.bool)
    if (band := config.importance_token_band) is not None:
        within_R &= _is_within(differences_R.exp(), band)
    if (band := config.importance_response_band) is not None and len(lengths):
        means_N = torch.stack([part.mean() for part in differences_R.split(list(lengths))])
        within_N = _is_within(means_N.exp(), band)
        within_R &= within_N.repeat_interleave(torch.tensor(lengths, device=within_N.device))
    return within_R


def _is_within(ratios: Tensor, band: tuple[float, float]) -> Tensor:
    return (ratios >= band[0]) & (ratios <= band[1])


def kl_penalty(reference_R: Tensor, policy_R: Tensor, kl_type: str) -> Tensor:
    """Estimates KL(policy || reference) per token from samples of the policy, in nats (mse: nats squared).

    k1 = policy - reference; k3 = exp(reference - policy) - (reference - policy) - 1; mse = (reference - policy)^2 / 2.

    Raises:
        ValueError: kl_type is unknown; the release trains without a KL on correct responses then.
    """
    difference = reference_R - policy_R
    if kl_type == "k3":
        return torch.expm1(difference) - difference
    if kl_type == "k1":
        return -difference
    if kl_type == "mse":
        return 0.5 * difference.square()
    raise ValueError(f"kl_type = {kl_type!r}: set it to k3, k1 or mse")


def reward_model_term(mean_scores_N: Tensor, correct_N: Tensor) -> Tensor:
    """Returns the sum over sequences of the cross-entropy of sigmoid(mean_t s_t) against the outcome, eq. (12).

    mean_scores_N: [N] with gradient, the means of the sequences' aligned scores. correct_N: bool [N].
    """
    return F.binary_cross_entropy_with_logits(mean_scores_N, correct_N.to(mean_scores_N.dtype), reduction="sum")


def ranking_loss(
    mean_scores: Sequence[float], outcomes: Sequence[bool], prompt_ids: Sequence[str]
) -> tuple[float, list[float]]:
    """Returns the loss of a ranking within prompts, and its derivative by each mean score.

    The loss is the mean of -log sigmoid(a - b) over all pairs of a correct response (a) and an incorrect one (b) to the
    same prompt (Bradley and Terry); 0 without such pairs. The sequences are those of the whole step.
    """
    scores = torch.tensor(mean_scores, dtype=torch.float64, requires_grad=True)
    correct = torch.tensor(outcomes, dtype=torch.bool)
    gaps = [
        (scores[group][correct[group], None] - scores[group][~correct[group]]).flatten()
        for group in positions_by(prompt_ids)
    ]
    total = torch.cat([scores.new_zeros(0), *gaps])
    loss = F.softplus(-total).mean() if len(total) else 0.0 * scores.sum()
    (derivative,) = torch.autograd.grad(loss, scores)
    return loss.item(), derivative.tolist()
