"""The tests that an objective of one's own should have."""

import math

import torch
from soft_clip import SoftClip, policy_loss

from oreal_megatron.testing import check_objective


def test_checks_of_every_objective():
    check_objective(["objective.functions.policy_loss=soft_clip.policy_loss"])


def test_value_by_hand():
    loss_R = policy_loss(
        logprobs_R=torch.tensor([math.log(1.1)]),
        rollout_logprobs_R=torch.zeros(1),
        weights_R=torch.ones(1),
        advantages_R=torch.tensor([2.0]),
        settings=SoftClip(limit=0.2),
    )
    torch.testing.assert_close(loss_R, torch.tensor([-2.0 * (1 + 0.2 * math.tanh(0.5))]))
