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
)
from oreal_megatron.losses.token_weights import token_weights
from oreal_megatron.mismatch import correction_metrics, rollout_mismatch
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
    logprobs = logprobs_of(reference, batches, groups)
    return [replace(batch, reference_logprobs=values) for batch, values in zip(batches, logprobs, strict=True)]


def logprobs_of(policy: torch.nn.Module, batches: Sequence[TokenBatch], groups: ParallelGroups) -> list[Tensor]:
    """Returns the log-probabilities of a policy without an update, fp32 [R] per micro-batch, in nats."""
    return score(policy, batches, lambda output, batch: output[batch.predicting, 0].clone(), groups)


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

    Micro-batches with `old_logprobs` belong to a step of several updates, whose rollouts are compared with the policy
    before the first of them (`rollout_differences`), and not here. max_mismatch: see there.

    Raises:
        UpdateRefused: on every rank, before the update.
    """
    is_only_update = batches[0].old_logprobs is None

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
            old_logprobs_R=batch.old_logprobs,
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
            **({} if is_only_update else _moved(seen_R, batch, config)),
        }
        detached = {name: value.detach() for name, value in sums.items()}
        return terms.loss(counts, config) + 0.0 * output.sum(), (detached, seen_R)

    results = policy.forward_backward(batches, loss)
    names = list(results[0][0])
    local = torch.stack([torch.stack([sums[name] for name in names]) for sums, _ in results]).double()
    _check_finite(dict(zip(names, local.t().tolist(), strict=True)), batches, policy.groups)
    mismatch = {}
    if is_only_update:
        seen = [seen_R for _, seen_R in results]
        mismatch = rollout_differences(seen, batches, config, policy.groups, max_mismatch=max_mismatch)
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
        **{f"policy/{name}": value for name, value in mean.items()},
        **mismatch,
        **{f"policy/{name}": value for name, value in update.items()},
    }


def _moved(logprobs_R: Tensor, batch: TokenBatch, config: ObjectiveConfig) -> dict[str, Tensor]:
    """Returns sums over the tokens that say how far a step's updates have moved the policy."""
    assert batch.old_logprobs is not None
    change_R = logprobs_R - batch.old_logprobs
    sums = {"kl_from_old": (torch.expm1(change_R) - change_R).sum()}
    if config.clip is not None:
        behaviour_R = batch.old_logprobs if config.ratio_reference == "self" else batch.rollout_logprobs
        sums["outside_clip"] = (((logprobs_R - behaviour_R).exp() - 1.0).abs() > config.clip).sum()
    return sums


def rollout_differences(
    logprobs: Sequence[Tensor],
    batches: Sequence[TokenBatch],
    config: ObjectiveConfig,
    groups: ParallelGroups,
    *,
    max_mismatch: float | None,
) -> dict[str, float]:
    """Compares the policy before the step's first update with the rollouts. Returns `policy/name` metrics.

    logprobs: the policy's log-probabilities, fp32 [R] per micro-batch. max_mismatch: limit of the mean |difference|
    from the rollouts' log-probabilities, in nats; None: no limit.

    Raises:
        UpdateRefused: on every rank, the mean difference is above the limit.
    """
    differences = [seen_R - batch.rollout_logprobs for seen_R, batch in zip(logprobs, batches, strict=True)]
    # Tokens of older weights differ by the updates since, which is no mismatch.
    newest = [difference_R[~batch.is_older] for batch, difference_R in zip(batches, differences, strict=True)]
    mismatch = rollout_mismatch(newest, groups)
    if max_mismatch is not None and mismatch.get("rollout_logprob_difference", 0.0) > max_mismatch:
        raise UpdateRefused(
            f"the policy's log-probabilities differ from the rollouts' by {mismatch['rollout_logprob_difference']:.3g} "
            f"nats in the mean, more than rollout.mismatch.stop = {max_mismatch:g} (99th percentile "
            f"{mismatch['rollout_logprob_difference_p99']:.3g}); no update was made. Check that the engine has the "
            "policy's weights, or raise rollout.mismatch.stop"
        )
    older = [difference_R[batch.is_older] for batch, difference_R in zip(batches, differences, strict=True)]
    mismatch |= {name.replace("rollout_", "older_"): value for name, value in rollout_mismatch(older, groups).items()}
    mismatch |= correction_metrics(config, batches, differences, groups)
    return {f"policy/{name}": value for name, value in mismatch.items()}


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
