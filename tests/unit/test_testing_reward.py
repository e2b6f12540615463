"""check_reward: the example's reward passes, and planted faults are found."""

from __future__ import annotations

import asyncio
import random
import time

import pytest
from pydantic import BaseModel

from oreal_megatron.config import ConfigError
from oreal_megatron.testing import RewardCase, check_reward

CASES = [
    RewardCase(question="Write abc backwards.", gold_answer="cba", response="cba", credit=1.0),
    RewardCase(question="Write abc backwards.", gold_answer="cba", response="cab", credit=0.25),
    RewardCase(question="Write abc backwards.", gold_answer="cba", response="cba", stopped=False, credit=0.0),
]


class Partial(BaseModel):
    weight: float = 0.25


def right(*, gold_answer, response, stopped, settings: Partial, **_):
    if not stopped or response == gold_answer:
        return float(stopped)
    return settings.weight * (response[:1] == gold_answer[:1])


async def right_and_async(**arguments):
    await asyncio.sleep(0)
    return right(**arguments, settings=Partial())


def wrong(*, gold_answer, response, stopped, **_):
    return stopped and gold_answer in response + "cba"


def by_chance(*, response, **_):
    return random.random() if response == "cab" else 1.0


def above_one(*, response, **_):
    return 1.5 if response == "cab" else 1.0


def raises_at_nothing(*, response, **_):
    return response[0] == "c"


def slow(*, response, **_):
    time.sleep(0.5 * (response == "nan"))
    return 1.0


def undecided(**_):
    return None


def test_right_rewards_pass():
    check_reward(f"{__name__}.right", CASES)
    check_reward(f"{__name__}.right_and_async", CASES)
    zero = [*CASES[:1], RewardCase(question="q", gold_answer="cba", response="cab", credit=0.0)]
    check_reward(f"{__name__}.right", zero, settings={"weight": 0.0})
    check_reward(f"{__name__}.undecided", [RewardCase(question="q", gold_answer="1", response="1", credit=None)])


@pytest.mark.parametrize(
    ("function", "fault"),
    [
        ("wrong", "the response 'cab' to 'Write abc backwards.' has the credit 1, and 0.25 is expected"),
        ("by_chance", "at the first call, and the reward is"),
        ("above_one", "the response 'cab': the reward is 1.5, no number in"),
        ("raises_at_nothing", "the response '' without the stop token: ValueError: rollout.reward = "),
        ("slow", "the response 'nan': no reward within 0.2 s"),
        ("undecided", "is UNDECIDED (the reward is None), and the credit 1 is expected"),
    ],
)
def test_a_planted_fault_is_found(function, fault):
    with pytest.raises(AssertionError) as caught:
        check_reward(f"{__name__}.{function}", CASES, seconds=0.2)
    assert fault in str(caught.value)


def test_wrong_settings_are_refused():
    with pytest.raises(ConfigError, match=r"rollout.reward.settings.wieght .* Did you mean `weight`"):
        check_reward(f"{__name__}.right", CASES, settings={"wieght": 1.0})
