"""Losses and advantages of published objectives, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from oreal_megatron.losses.published import (
    CappedWeight,
    ClipRange,
    Overlong,
    capped_importance,
    centred,
    clip_higher,
    overlong_shaped,
    sequence_ratio,
)
from oreal_megatron.types import FinishReason, Grade, GradedRollout, Prompt, Rollout, Verdict, WeightSpan

OLD = torch.tensor([-1.0, -1.0, -1.0, -1.0])
NEW = OLD + torch.tensor([1.5, 1.1, 0.9, 0.5]).log()  # ratios
VALUES = {
    "logprobs_R": NEW,
    "old_logprobs_R": NEW,
    "detached_logprobs_R": NEW,
    "rollout_logprobs_R": OLD,
    "weights_R": torch.ones(4),
}


def graded(length: int, credit: float) -> GradedRollout:
    rollout = Rollout(
        prompt=Prompt(id="p", question="q", gold_answer="1"), sample_index=0, prompt_ids=(1,),
        response_ids=np.zeros(length, np.int32), logprobs=np.zeros(length, np.float32), text="",
        finish_reason=FinishReason.STOP, weight_spans=(WeightSpan(version=0, start=0, end=length),),
    )  # fmt: skip
    verdict = Verdict.CORRECT if credit == 1 else Verdict.INCORRECT
    return GradedRollout(rollout=rollout, grade=Grade(verdict=verdict, credit=credit, reason="", stage="reward"))


def test_ratios_are_clipped_higher_above_than_below():
    limits = ClipRange(low=0.2, high=0.28)
    gain = clip_higher(**VALUES, advantages_R=torch.full((4,), 2.0), settings=limits)
    torch.testing.assert_close(gain, -2.0 * torch.tensor([1.28, 1.1, 0.9, 0.5]))
    loss = clip_higher(**VALUES, advantages_R=torch.full((4,), -2.0), settings=limits)
    torch.testing.assert_close(loss, 2.0 * torch.tensor([1.5, 1.1, 0.9, 0.8]))


def test_a_response_has_the_geometric_mean_of_its_ratios():
    loss = sequence_ratio(
        **VALUES, advantages_R=torch.tensor([1.0, 1.0, 1.0, 1.0]), lengths=(1, 3), settings=ClipRange(low=0.2, high=0.2)
    )
    mean = (1.1 * 0.9 * 0.5) ** (1 / 3)  # 0.79, which is not clipped for a positive advantage
    torch.testing.assert_close(loss, -torch.tensor([1.2, mean, mean, mean]))


def test_capped_weights_keep_every_gradient():
    logprobs = NEW.clone().requires_grad_()
    values = {**VALUES, "logprobs_R": logprobs}
    loss = capped_importance(**values, advantages_R=torch.full((4,), 2.0), settings=CappedWeight(high=0.28))
    loss.sum().backward()
    torch.testing.assert_close(logprobs.grad, -2.0 * torch.tensor([1.28, 1.1, 0.9, 0.5]))


def test_centred_advantages_are_not_divided_by_the_spread():
    assert centred(responses=[graded(1, 1.0), graded(9, 0.0), graded(4, 0.0), graded(4, 0.5)]) == pytest.approx(
        [0.625, -0.375, -0.375, 0.125]
    )


def test_reward_falls_towards_the_longest_response():
    # The reward falls from 80 tokens on: 1, 1 - 1/2, -1, -1 - 1.
    responses = [graded(80, 1.0), graded(90, 1.0), graded(50, 0.0), graded(100, 0.0)]
    rewards = [1.0, 0.5, -1.0, -2.0]
    mean, std = np.mean(rewards), np.std(rewards)
    found = overlong_shaped(responses=responses, settings=Overlong(max_tokens=100, buffer_share=0.2, epsilon=0.0))
    assert found == pytest.approx([(reward - mean) / std for reward in rewards])
    equal = overlong_shaped(responses=[graded(3, 1.0)] * 2, settings=Overlong(max_tokens=100, buffer_share=0.2))
    assert equal == [0.0, 0.0] and not any(map(math.isnan, equal))
