"""The policy's updates of a step: a single one, or several epochs over mini-batches of the step's responses.

With several updates, the log-probabilities before the first update are computed once. They are the denominator of
ratios, so clipping bounds how far all updates of a step move the policy, and the numerator of the importance weights
that correct for rollouts of another policy (the decoupled objective of arXiv 2110.00641).
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from oreal_megatron.config import ObjectiveConfig
from oreal_megatron.data.packing import TokenBatch
from oreal_megatron.losses.policy_terms import TokenCounts
from oreal_megatron.models.trained_model import TrainedModel
from oreal_megatron.step import UpdateRefused, logprobs_of, rollout_differences, update_policy

S = TypeVar("S")

Minibatch = tuple[TokenCounts, list[TokenBatch]]
"""Global token counts of a mini-batch, and this rank's micro-batches of it."""


def split_into_minibatches(responses: Sequence[S], number: int, *, seed: int) -> list[list[S]]:
    """Splits the responses of a step into `number` parts at random, whose sizes differ by one at most.

    A single part has the responses in their order; no part is empty. The parts depend on the responses' order and the
    seed alone, so they are the same on every rank and in every layout.
    """
    if number == 1:
        return [list(responses)]
    shuffled = random.Random(seed).sample(list(responses), len(responses))
    number = min(number, len(shuffled))
    return [shuffled[index::number] for index in range(number)]


def all_batches(minibatches: Sequence[Minibatch]) -> list[TokenBatch]:
    """Returns the micro-batches of all mini-batches, one mini-batch after the other."""
    return [batch for _, batches in minibatches for batch in batches]


def with_batches(minibatches: Sequence[Minibatch], batches: Sequence[TokenBatch]) -> list[Minibatch]:
    """Returns the mini-batches with other micro-batches, which are in the order of `all_batches`."""
    rest = iter(batches)
    return [(counts, [next(rest) for _ in earlier]) for counts, earlier in minibatches]


def update_policy_in_minibatches(
    policy: TrainedModel,
    minibatches: Sequence[Minibatch],
    config: ObjectiveConfig,
    *,
    max_mismatch: float | None = None,
) -> dict[str, float]:
    """Makes the updates of `objective.updates`: in every epoch one on each mini-batch, in the same order.

    Returns metrics: means over the updates, and the learning rate of the last one. Each update divides by the token
    counts of its own mini-batch. max_mismatch: see `update_policy`; it bounds the policy before the first update alone,
    since later ones are off-policy by design.

    Raises:
        UpdateRefused: on every rank, before an update, which the message names. Earlier updates of the step were made:
            the policy in memory is neither to be saved nor published.
    """
    if config.updates.number == 1:
        ((counts, batches),) = minibatches
        return update_policy(policy, batches, config, counts, max_mismatch=max_mismatch)
    batches = all_batches(minibatches)
    old = logprobs_of(policy.module, batches, policy.groups)
    mismatch = rollout_differences(old, batches, config, policy.groups, max_mismatch=max_mismatch)
    batches = [replace(batch, old_logprobs=old_R) for batch, old_R in zip(batches, old, strict=True)]
    order = with_batches(minibatches, batches) * config.updates.epochs
    reports: list[dict[str, float]] = []
    for number, (counts, some) in enumerate(order, start=1):
        try:
            reports.append(update_policy(policy, some, config, counts))
        except UpdateRefused as error:
            undone = "" if number == 1 else ". The step's earlier updates are neither saved nor published"
            raise UpdateRefused(f"update {number} of {len(order)}: {error}{undone}") from error
    return {
        **{name: math.fsum(report[name] for report in reports) / len(reports) for name in reports[0]},
        **mismatch,
        "policy/lr": reports[-1]["policy/lr"],
        "policy/updates": float(len(reports)),
    }
