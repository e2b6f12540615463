"""The tests that an objective of one's own should have."""

import math

import torch
from gspo import Clip, policy_loss

from oreal_megatron.testing import check_objective


def test_checks_of_every_objective():
    check_objective(["objective.functions.policy_loss=gspo.policy_loss"], reads="sequence")


def test_value_by_hand():
    loss_R = policy_loss(
        logprobs_R=torch.tensor([-1.0, -2.0]),
        rollout_logprobs_R=torch.tensor([-1.5, -1.9]),
        advantages_R=torch.tensor([2.0, 2.0]),
        lengths=(2,),
        settings=Clip(low=0.3, high=0.3),
    )
    torch.testing.assert_close(loss_R, torch.full((2,), -2.0 * math.exp(0.2)))
