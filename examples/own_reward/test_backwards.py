"""The test of the reward."""

from oreal_megatron.testing import RewardCase, check_reward

CASE = {"question": "Write abc backwards.", "gold_answer": "cba"}


def test_backwards():
    cases = [
        RewardCase(**CASE, response="cba", credit=1.0),
        RewardCase(**CASE, response="cab", credit=0.25),
        RewardCase(**CASE, response="cba", stopped=False, credit=0.0),
    ]
    check_reward("backwards.reward", cases)


def test_without_partial_credit():
    case = RewardCase(**CASE, response="cab", credit=0.0)
    check_reward("backwards.reward", [case], settings={"partial": False})
