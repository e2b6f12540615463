"""Measures of how far the policy is from the weights that generated its rollouts, over all data-parallel ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from oreal_megatron.distributed.groups import ParallelGroups


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


def importance_metrics(differences: Sequence[Tensor], limit: float, groups: ParallelGroups) -> dict[str, float]:
    """Returns the mean of the truncated importance weights, and the share of tokens whose weight is truncated."""
    ratios = [difference.double().exp() for difference in differences]
    local = [[r.clamp(max=limit).sum().item(), (r > limit).sum().item(), len(r)] for r in ratios]
    total, truncated, count = groups.sum_over_data(torch.tensor(local).sum(0)).tolist()
    return {"importance_weight": total / max(count, 1), "importance_truncated": truncated / max(count, 1)}
