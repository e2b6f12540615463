"""Several updates of the policy in a step: the split, learning rates, counts, and a refusal in a later update."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from oreal_megatron.config import parse_config
from oreal_megatron.data.packing import micro_batches
from oreal_megatron.losses.policy_terms import TokenCounts
from oreal_megatron.models.policy import build_policy
from oreal_megatron.policy_updates import split_into_minibatches, update_policy_in_minibatches
from oreal_megatron.step import UpdateRefused, update_policy, with_reference, with_token_weights
from tests.unit.test_step import CPU, sequences, trained


def minibatches_of(responses, number, config, groups):
    """Mini-batches with counts, and all that an update reads; the first model's weights are the reference."""
    made = []
    for part in split_into_minibatches(responses, number, seed=0):
        counts = TokenCounts(
            *(sum(len(s.response_ids) for s in part if s.correct is outcome) for outcome in (True, False)), limit=0
        )
        batches = with_token_weights(micro_batches(part, 24, CPU), None, config, groups)
        made.append((counts, with_reference(trained(build_policy, groups).module, batches, groups)))
    return made


def test_parts_are_whole_even_and_never_empty():
    items = [f"r{index}" for index in range(7)]
    assert split_into_minibatches(items, 1, seed=0) == [items]
    parts = split_into_minibatches(items, 3, seed=0)
    assert sorted(map(len, parts)) == [2, 2, 3] and sorted(item for part in parts for item in part) == items
    assert parts == split_into_minibatches(items, 3, seed=0) != split_into_minibatches(items, 3, seed=1)
    assert sorted(split_into_minibatches(items[:2], 3, seed=0)) == [["r0"], ["r1"]]


def test_every_update_has_its_own_learning_rate_and_counts(composed, single_process):
    """Updates by hand: one after the other, on the same batches and against the same earlier log-probabilities."""
    config = parse_config(composed("objective=grpo_epochs")).objective
    minibatches = minibatches_of(sequences(), 2, config, single_process)
    policy, by_hand = trained(build_policy, single_process), trained(build_policy, single_process)
    metrics = update_policy_in_minibatches(policy, minibatches, config)
    # The reference is the policy before the step, so its log-probabilities are the earlier ones.
    order = [(counts, [replace(b, old_logprobs=b.reference_logprobs) for b in some]) for counts, some in minibatches]
    reports = [update_policy(by_hand, some, config, counts) for counts, some in order * 2]
    for a, b in zip(policy.module.parameters(), by_hand.module.parameters(), strict=True):
        assert torch.equal(a, b)
    assert [report["policy/lr"] for report in reports[:2]] == pytest.approx([5e-4, 1e-3])  # two updates of warm-up
    assert metrics["policy/lr"] == reports[3]["policy/lr"] and policy.schedule.num_steps == 4
    assert metrics["loss/positive"] == pytest.approx(sum(report["loss/positive"] for report in reports) / 4)
    assert metrics["policy/updates"] == 4 and metrics["policy/kl_from_old"] > 0
    assert reports[0]["policy/kl_from_old"] == 0 and reports[0]["policy/outside_clip"] == 0
    # Importance and mismatch are those of the policy before the step: pi / pi_rollout with log pi_rollout = -1.
    ratios = torch.cat([b.reference_logprobs for _, some in minibatches for b in some]).add(1.0).exp()
    assert metrics["policy/importance_weight"] == pytest.approx(ratios.clamp(max=2.0).mean().item(), rel=1e-5)
    difference = ratios.log().abs().mean().item()
    assert metrics["policy/rollout_logprob_difference"] == pytest.approx(difference, rel=1e-5)


def test_one_epoch_on_one_part_is_a_single_update(composed, single_process):
    config = parse_config(composed("objective=grpo")).objective
    minibatches = minibatches_of(sequences(), 1, config, single_process)
    policy, by_hand = trained(build_policy, single_process), trained(build_policy, single_process)
    ((counts, batches),) = minibatches
    assert update_policy_in_minibatches(policy, minibatches, config) == update_policy(by_hand, batches, config, counts)


def test_rollouts_of_another_model_are_refused_before_the_first_update(composed, single_process):
    config = parse_config(composed("objective=grpo_epochs")).objective
    policy = trained(build_policy, single_process)
    before = [p.detach().clone() for p in policy.module.parameters()]
    with pytest.raises(UpdateRefused, match=r"more than rollout.mismatch.stop = 0.5 .*no update was made"):
        minibatches = minibatches_of(sequences(), 2, config, single_process)
        update_policy_in_minibatches(policy, minibatches, config, max_mismatch=0.5)
    assert all(torch.equal(a, b) for a, b in zip(before, policy.module.parameters(), strict=True))


def test_a_refusal_of_a_later_update_says_so(composed, single_process):
    config = parse_config(composed("objective=grpo_epochs")).objective
    minibatches = minibatches_of(sequences(), 2, config, single_process)
    minibatches[1][1][0].advantages[0] = math.nan
    with pytest.raises(UpdateRefused, match=r"^update 2 of 4: terms(?s:.*)earlier updates are neither saved nor"):
        update_policy_in_minibatches(trained(build_policy, single_process), minibatches, config)
