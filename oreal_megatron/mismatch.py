"""Measures of how far the policy is from the weights that generated its rollouts, over all data-parallel ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from oreal_megatron.config import ObjectiveConfig
from oreal_megatron.data.packing import TokenBatch
from oreal_megatron.distributed.groups import ParallelGroups
from oreal_megatron.losses.policy_terms import within_bands


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


def correction_metrics(
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
