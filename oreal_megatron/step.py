"""Computations of a step on its three models: scores, token weights, and the two updates.

Every list has one entry per micro-batch of this rank: a tensor [R] over its response tokens in packed order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from oreal_megatron.config import ObjectiveConfig
from oreal_megatron.data.packing import TokenBatch
from oreal_megatron.distributed.groups import ParallelGroups
from oreal_megatron.extensions import described, objective_function
from oreal_megatron.losses.policy_terms import (
    TokenCounts,
    policy_terms,
    ranking_loss,
    reward_model_term,
    within_bands,
)
from oreal_megatron.losses.token_weights import token_weights
from oreal_megatron.models.pipeline_schedule import score
from oreal_megatron.models.trained_model import TrainedModel


class UpdateRefused(ArithmeticError):
    """Raised in place of an update that would damage the model.

    A loss, a term or a gradient is not a finite number, or the rollouts' log-probabilities are not the policy's.
    """


@dataclass(frozen=True)
class ScoredSequences:
    """Scores of this rank's sequences by the reward model, before its update."""

    scores: list[Tensor]
    """fp32 [R] per micro-batch, aligned to the response tokens."""
    mean_scores: list[float]
    """Mean score of each sequence, which is the logit of its outcome."""
    outcomes: list[bool]
    """Whether each sequence is correct."""


def with_reference(
    reference: torch.nn.Module, batches: Sequence[TokenBatch], groups: ParallelGroups
) -> list[TokenBatch]:
    """Returns the micro-batches with the reference's log-probabilities."""
    logprobs = score(reference, batches, lambda output, batch: output[batch.predicting, 0].clone(), groups)
    return [replace(batch, reference_logprobs=values) for batch, values in zip(batches, logprobs, strict=True)]


def with_token_weights(
    batches: Sequence[TokenBatch], scored: ScoredSequences | None, config: ObjectiveConfig, groups: ParallelGroups
) -> list[TokenBatch]:
    """Returns the micro-batches with token weights from the reward model's scores; zero scores if `scored` is None.

    Raises:
        ValueError: `objective.functions.token_weights` failed, or returned something else than weights. OSError on the
            ranks where it did not.
    """
    function = objective_function(config, "token_weights")
    scores = [torch.zeros_like(b.rollout_logprobs) for b in batches] if scored is None else scored.scores
    if function is None:
        weights = [_weights(scores_R, batch, config) for batch, scores_R in zip(batches, scores, strict=True)]
    else:
        weights = _weights_of_function(function, batches, scores, config, groups)
    return [
        replace(batch, token_weights=weights_R, token_scores=None if scored is None else scores_R)
        for batch, weights_R, scores_R in zip(batches, weights, scores, strict=True)
    ]


def _weights(scores_R: Tensor, batch: TokenBatch, config: ObjectiveConfig) -> Tensor:
    """Returns the weights [R] of a micro-batch by `token_weights`."""
    parts = [
        token_weights(scores_T, correct=correct, config=config.token_weights)
        for scores_T, correct in zip(batch.split_by_sequence(scores_R), batch.correct.tolist(), strict=True)
    ]
    return torch.cat([scores_R.new_zeros(0), *parts])


def _weights_of_function(
    function: Callable[..., Tensor],
    batches: Sequence[TokenBatch],
    scores: Sequence[Tensor],
    config: ObjectiveConfig,
    groups: ParallelGroups,
) -> list[Tensor]:
    """Returns the weights [R] that a user's function gives. One process of each model replica calls it."""
    mine: list[Tensor] = []
    with groups.together():
        for batch, scores_R in zip(batches, scores, strict=True) if groups.leads_replica else ():
            parts = [scores_R.new_zeros(0)]
            for place, scores_T in enumerate(batch.split_by_sequence(scores_R)):
                what = f"{described(config, 'token_weights')} of {batch.ids[place]}"
                prompt_ids, response_ids = batch.ids_of(place)
                weights_T = function(
                    scores_T=scores_T,
                    correct=bool(batch.correct[place]),
                    config=config.token_weights,
                    prompt_ids=prompt_ids,
                    response_ids=response_ids,
                )
                parts.append(_checked(weights_T, scores_T, what))
            mine.append(torch.cat(parts).cpu())
    shared = groups.from_replica_leader(mine)
    return [weights_R.to(scores_R.device) for weights_R, scores_R in zip(shared, scores, strict=True)]


def _checked(weights_T: object, scores_T: Tensor, what: str) -> Tensor:
    """Returns what a user's function gave. Raises ValueError where it is not a weight for each token."""
    wanted = f"return a float32 tensor of shape {list(scores_T.shape)} on {scores_T.device}"
    if not isinstance(weights_T, Tensor):
        raise ValueError(f"{what} returned a {type(weights_T).__name__}; {wanted}")
    if weights_T.shape != scores_T.shape or weights_T.dtype != torch.float32 or weights_T.device != scores_T.device:
        found = f"{weights_T.dtype} of shape {list(weights_T.shape)} on {weights_T.device}"
        raise ValueError(f"{what} returned {found}; {wanted}")
    if not bool((weights_T.isfinite() & (weights_T >= 0)).all()):
        wrong = weights_T[~(weights_T.isfinite() & (weights_T >= 0))][0].item()
        raise ValueError(f"{what} returned a weight of {wrong}; return finite numbers of at least 0")
    return weights_T.detach()


def score_sequences(
    model: torch.nn.Module, batches: Sequence[TokenBatch], alignment: str, groups: ParallelGroups
) -> ScoredSequences:
    """Scores sequences with the reward model, without an update."""
    return _scored(score(model, batches, lambda out, batch: _aligned(out, batch, alignment).clone(), groups), batches)


def over_all_ranks(
    scored: ScoredSequences, batches: Sequence[TokenBatch], groups: ParallelGroups
) -> tuple[list[str], list[float], list[bool]]:
    """Returns ids, mean scores and outcomes of all ranks' sequences, the same on every rank."""
    ids = (id for batch in batches for id in batch.ids)
    parts = groups.gather_over_data(list(zip(ids, scored.mean_scores, scored.outcomes, strict=True)))
    rows = [row for part in parts for row in part]
    return [id for id, _, _ in rows], [score for _, score, _ in rows], [outcome for _, _, outcome in rows]


def update_reward_model(
    reward_model: TrainedModel,
    batches: Sequence[TokenBatch],
    config: ObjectiveConfig,
    *,
    num_sequences: int,
    prompt_of: Mapping[str, str] | None = None,
) -> tuple[ScoredSequences, dict[str, float]]:
    """Updates the reward model by eq. (12). Returns the scores from before the update, and `section/name` metrics.

    num_sequences: number of sequences in the step, over all ranks. prompt_of: sequence's id -> prompt's id, for
    `objective.reward_model.ranking_weight`.

    Raises:
        UpdateRefused: on every rank, before the update.
    """
    groups, alignment = reward_model.groups, config.token_weights.alignment
    ranking = 0.0
    derivatives: dict[str, float] = {}
    if config.reward_model.ranking_weight:
        assert prompt_of is not None
        before = score_sequences(reward_model.module, batches, alignment, groups)
        ranking, derivatives = _ranking(before, batches, prompt_of, groups)

    def loss(output: Tensor, batch: TokenBatch) -> tuple[Tensor, tuple[Tensor, float]]:
        scores_R = _aligned(output, batch, alignment)
        means_N = _sequence_means(scores_R, batch)
        term = reward_model_term(means_N, batch.correct) / num_sequences
        total = term
        if derivatives:
            # The gradient of the ranking by the scores is known from a forward pass of the whole step.
            by_mean_N = means_N.new_tensor([derivatives[id] for id in batch.ids])
            total = term + config.reward_model.ranking_weight * (means_N * by_mean_N).sum()
        # A micro-batch without sequences still takes part in the backward pass, with a gradient of zero.
        return total + 0.0 * output.sum(), (scores_R.detach().clone(), term.item())

    results = reward_model.forward_backward(batches, loss)
    scores, losses = [scores for scores, _ in results], [value for _, value in results]
    _check_finite({"reward_model": losses}, batches, groups)
    metrics = _update(reward_model, "reward model", batches)
    return _scored(scores, batches), {
        "loss/reward_model": groups.sum_over_data(torch.tensor(math.fsum(losses))).item(),
        **({"loss/reward_model_ranking": ranking} if derivatives else {}),
        **{f"reward_model/{name}": value for name, value in metrics.items()},
    }


def _ranking(
    scored: ScoredSequences, batches: Sequence[TokenBatch], prompt_of: Mapping[str, str], groups: ParallelGroups
) -> tuple[float, dict[str, float]]:
    """Returns the ranking loss of the whole step, and its derivative by each sequence's mean score, by id."""
    ids, scores, outcomes = over_all_ranks(scored, batches, groups)
    value, derivatives = ranking_loss(scores, outcomes, [prompt_of[id] for id in ids])
    return value, dict(zip(ids, derivatives, strict=True))


def update_policy(
    policy: TrainedModel,
    batches: Sequence[TokenBatch],
    config: ObjectiveConfig,
    counts: TokenCounts,
    *,
    max_mismatch: float | None = None,
) -> dict[str, float]:
    """Updates the policy by eq. (11) or a baseline's objective. Returns `section/name` metrics over all ranks.

    max_mismatch: limit of the mean |difference| from the rollouts' log-probabilities, in nats; None: no limit.

    Raises:
        UpdateRefused: on every rank, before the update.
    """

    def loss(output: Tensor, batch: TokenBatch) -> tuple[Tensor, tuple[dict[str, Tensor], Tensor]]:
        assert batch.reference_logprobs is not None and batch.token_weights is not None
        logprobs_R, entropy_R = output[batch.predicting].unbind(-1)
        terms = policy_terms(
            config,
            logprobs_R=logprobs_R,
            reference_logprobs_R=batch.reference_logprobs,
            rollout_logprobs_R=batch.rollout_logprobs,
            weights_R=batch.token_weights,
            advantages_R=batch.per_token(batch.advantages),
            correct_R=batch.per_token(batch.correct),
            lengths=batch.response_lengths,
        )
        seen_R = logprobs_R.detach()
        sums = {
            "positive": terms.positive,
            "negative": terms.negative,
            "kl": terms.kl,
            "kl_k1": (seen_R - batch.reference_logprobs).sum(),
            "entropy": entropy_R.sum(),
            "token_weight": batch.token_weights.sum(),
            "zero_token_weights": (batch.token_weights == 0).sum(),
        }
        detached = {name: value.detach() for name, value in sums.items()}
        return terms.loss(counts, config) + 0.0 * output.sum(), (detached, seen_R - batch.rollout_logprobs)

    results = policy.forward_backward(batches, loss)
    names = list(results[0][0])
    local = torch.stack([torch.stack([sums[name] for name in names]) for sums, _ in results]).double()
    _check_finite(dict(zip(names, local.t().tolist(), strict=True)), batches, policy.groups)
    # Tokens of older weights differ by the updates since, which is no mismatch.
    differences = [difference_R[~batch.is_older] for batch, (_, difference_R) in zip(batches, results, strict=True)]
    mismatch = rollout_mismatch(differences, policy.groups)
    if max_mismatch is not None and mismatch.get("rollout_logprob_difference", 0.0) > max_mismatch:
        raise UpdateRefused(
            f"the policy's log-probabilities differ from the rollouts' by {mismatch['rollout_logprob_difference']:.3g} "
            f"nats in the mean, more than rollout.mismatch.stop = {max_mismatch:g} (99th percentile "
            f"{mismatch['rollout_logprob_difference_p99']:.3g}); no update was made. Check that the engine has the "
            "policy's weights, or raise rollout.mismatch.stop"
        )
    older = [difference_R[batch.is_older] for batch, (_, difference_R) in zip(batches, results, strict=True)]
    mismatch |= {
        name.replace("rollout_", "older_"): value for name, value in rollout_mismatch(older, policy.groups).items()
    }
    mismatch |= _corrections(config, batches, [difference_R for _, difference_R in results], policy.groups)
    update = _update(policy, "policy", batches)
    total = dict(zip(names, policy.groups.sum_over_data(local.sum(0)).tolist(), strict=True))
    positive = total["positive"] / counts.of_positive(config)
    negative = total["negative"] / counts.of_negative(config)
    mean = {name: total[name] / max(counts.all, 1) for name in names if name not in ("positive", "negative")}
    return {
        "loss/positive": positive,
        "loss/negative": negative,
        "loss/kl": mean.pop("kl"),
        "loss/policy": positive + config.eta * negative + config.beta * total["kl"] / counts.of_kl(config),
        **{f"policy/{name}": value for name, value in (mean | mismatch | update).items()},
    }


def rollout_mismatch(differences: Sequence[Tensor], groups: ParallelGroups) -> dict[str, float]:
    """Measures how far the policy is from the weights that generated the tokens; on-policy, rounding alone remains.

    differences: fp32 [R] per micro-batch of this rank, log pi - log pi_rollout of tokens that pi_rollout drew, in nats.
    Returns the mean, 99th percentile and maximum of the absolute difference; the k3 estimate of KL(rollout || policy);
    and the effective sample size of the importance weights pi / pi_rollout as a share of the tokens, in (0, 1].
    """
    parts = [difference.detach().float() for difference in differences if len(difference)]
    local = torch.zeros(5, dtype=torch.float64)
    for difference_R in map(Tensor.double, parts):
        weights_R = difference_R.exp()
        terms = (difference_R.abs(), weights_R - 1 - difference_R, weights_R, weights_R**2)
        local += torch.stack([difference_R.new_tensor(len(difference_R)), *(term.sum() for term in terms)]).cpu()
    count, absolute, kl, weight, square = groups.sum_over_data(local).tolist()
    if not count:
        return {}
    largest = torch.stack([difference_R.abs().max().cpu() for difference_R in parts] or [torch.zeros(())]).max()
    return {
        "rollout_logprob_difference": absolute / count,
        "rollout_logprob_difference_p99": _smallest(parts, math.ceil(0.99 * count), groups),
        "rollout_logprob_difference_max": groups.max_over_world(largest).item(),
        "rollout_kl_k3": kl / count,
        "rollout_effective_samples": weight**2 / (count * square),
    }


def _smallest(parts: Sequence[Tensor], k: int, groups: ParallelGroups) -> float:
    """Returns the k-th smallest absolute value over all data-parallel ranks, k from 1, exactly.

    parts: fp32 [R] each. The bits of floats that are not negative are ordered as the floats are: two histograms, of the
    upper and then the lower 16 bits, find the value without gathering the others.
    """
    bits = [part.abs().view(torch.int32) for part in parts]
    upper, k = _bin_of(k, [part >> 16 for part in bits], groups)
    lower, _ = _bin_of(k, [part[part >> 16 == upper] & 0xFFFF for part in bits], groups)
    return torch.tensor(upper << 16 | lower, dtype=torch.int32).view(torch.float32).item()


def _bin_of(k: int, parts: Sequence[Tensor], groups: ParallelGroups) -> tuple[int, int]:
    """Returns the k-th smallest of ints below 65,536 over all data-parallel ranks, and its place among equal ones."""
    counts = torch.zeros(1 << 16, dtype=torch.float64)
    for part in parts:
        counts += part.bincount(minlength=1 << 16).cpu()
    below = groups.sum_over_data(counts).cumsum(0)
    found = int(torch.searchsorted(below, k))
    return found, k - (int(below[found - 1]) if found else 0)


def _corrections(
    config: ObjectiveConfig, batches: Sequence[TokenBatch], differences: Sequence[Tensor], groups: ParallelGroups
) -> dict[str, float]:
    """Returns metrics of the corrections for rollouts of other weights; empty without corrections.

    differences: fp32 [R] per micro-batch of this rank, log pi - log pi_rollout in nats.
    """
    limit = math.inf if config.importance_limit is None else config.importance_limit
    has_bands = config.importance_token_band is not None or config.importance_response_band is not None
    if config.importance_limit is None and not has_bands:
        return {}
    local = torch.zeros(8, dtype=torch.float64)
    for batch, difference_R in zip(batches, differences, strict=True):
        within_R = within_bands(config, difference_R, batch.response_lengths)
        ratio_R = difference_R.double().exp()
        weight_R = ratio_R.clamp(max=limit)
        used_R = weight_R * within_R
        without = [not part.any() for part in batch.split_by_sequence(within_R)]
        sums = [weight_R.sum(), (ratio_R > limit).sum(), (~within_R).sum(), used_R.sum(), used_R.square().sum()]
        local += torch.tensor([*map(float, sums), len(ratio_R), sum(without), len(without)], dtype=torch.float64)
    weight, truncated, outside, used, square, tokens, dropped, responses = groups.sum_over_data(local).tolist()
    metrics = {"importance_effective_samples": used**2 / (tokens * square) if square else 0.0}
    if config.importance_limit is not None:
        metrics |= {"importance_weight": weight / max(tokens, 1), "importance_truncated": truncated / max(tokens, 1)}
    if has_bands:
        metrics |= {
            "importance_dropped_tokens": outside / max(tokens, 1),
            "importance_dropped_responses": dropped / max(responses, 1),
        }
    return metrics


def _aligned(output: Tensor, batch: TokenBatch, alignment: str) -> Tensor:
    """Returns [R] of the reward model's output [1, T, 1]: at the position before each response token, or at its own."""
    return output[0, batch.predicting + (1 if alignment == "inclusive" else 0), 0]


def _sequence_means(scores_R: Tensor, batch: TokenBatch) -> Tensor:
    """Returns the mean score of each sequence, [N]."""
    parts = [part.mean() for part in batch.split_by_sequence(scores_R)]
    return torch.stack(parts) if parts else scores_R.new_zeros(0)


def _scored(scores: list[Tensor], batches: Sequence[TokenBatch]) -> ScoredSequences:
    means = [_sequence_means(scores_R, batch) for scores_R, batch in zip(scores, batches, strict=True)]
    return ScoredSequences(
        scores=scores,
        mean_scores=[value for mean_N in means for value in mean_N.tolist()],
        outcomes=[value for batch in batches for value in batch.correct.tolist()],
    )


def _update(model: TrainedModel, name: str, batches: Sequence[TokenBatch]) -> dict[str, float]:
    try:
        return model.update()
    except FloatingPointError as error:
        ids = ", ".join(id for batch in batches for id in batch.ids)
        raise UpdateRefused(f"{name}: {error}, no update was made. The sequences were {ids}") from error


def _check_finite(values: dict[str, list[float]], batches: Sequence[TokenBatch], groups: ParallelGroups) -> None:
    """Raises UpdateRefused on every rank where a micro-batch of any rank has a term that is not finite."""
    bad = [
        (name, value, batches[index].ids)
        for name, per_batch in values.items()
        for index, value in enumerate(per_batch)
        if not math.isfinite(value)
    ]
    found = [item for part in groups.gather_over_data(bad) for item in part]
    if found:
        lines = "\n".join(f"  {name} = {value} in a micro-batch of {', '.join(ids)}" for name, value, ids in found)
        raise UpdateRefused(f"terms that are not finite numbers:\n{lines}")
