"""Checks of a user's own parts, for their tests: an objective, a reward, a model family.

from oreal_megatron.testing import check_objective

def test_my_objective():
    check_objective(["objective.functions.policy_loss=mine.policy_loss"])
"""

from oreal_megatron.testing.model_family import check_model_family
from oreal_megatron.testing.objective import check_objective
from oreal_megatron.testing.reward import RewardCase, check_reward

__all__ = ["RewardCase", "check_model_family", "check_objective", "check_reward"]
