"""A reward function of one's own: what it returns, raises and how long it takes decide the verdict and the credit."""

from __future__ import annotations

import asyncio
import time

import numpy as np
import pytest
from pydantic import BaseModel

from oreal_megatron.config import ConfigError, FunctionConfig
from oreal_megatron.extensions import REWARD_PARAMETERS, load_function
from oreal_megatron.types import GradeRequest, Verdict
from oreal_megatron.verifier import VerifierConfig, build_verifier

C, I, U = Verdict.CORRECT, Verdict.INCORRECT, Verdict.UNDECIDED  # noqa: E741
RETURNED = {"sum": 0.6 + 0.3 + 0.1, "above": 1 + 1e-12, "numpy": np.float32(1), "flag": np.True_}
RETURNED |= {"true": True, "one": 1, "part": 0.25, "false": False, "none": None, "large": 7, "text": "yes"}


class Settings(BaseModel):
    seconds: float = 0.0


def looked_up(*, question, gold_answer, response, stopped, settings: Settings):
    time.sleep(settings.seconds)
    return RETURNED[response]


async def asked(*, response, **_):
    await asyncio.sleep(0.01)
    if response == "late":
        await asyncio.sleep(60.0)
    return RETURNED[response]


def later(**values):
    """A function that is not async, and returns an awaitable."""
    return asked(**values)


def graded(function, responses, *, settings=None, **verifier):
    config = FunctionConfig(path=f"{__name__}.{function}", settings=settings or {})
    reward = load_function("rollout.reward", config, REWARD_PARAMETERS)
    requests = [GradeRequest(question="q", gold_answer="g", response=text, stopped=True) for text in responses]
    with build_verifier(VerifierConfig(**verifier), reward) as built:
        return built.grade(requests), built.drain_metrics()


@pytest.mark.parametrize("function", ["looked_up", "asked", "later"])
def test_what_is_returned_is_the_verdict(function):
    grades, metrics = graded(function, [*RETURNED, "unknown"])
    assert [(grade.verdict, grade.credit) for grade in grades] == [
        (C, 1.0), (C, 1.0), (C, 1.0), (C, None), (C, None), (C, 1.0), (I, 0.25), (I, None),
        (U, None), (U, None), (U, None), (U, None),
    ]  # fmt: skip
    assert {grade.stage for grade in grades} == {"reward"}
    assert grades[9].reason == "the reward is 7, no number in [0, 1], bool or None"
    assert "KeyError: 'unknown'" in grades[11].reason
    assert metrics["verifier/num_graded"] == 12 and metrics["verifier/num_undecided"] == 4


@pytest.mark.parametrize(
    ("function", "responses", "settings"), [("looked_up", ["true"], {"seconds": 1e6}), ("asked", ["late", "one"], {})]
)
def test_a_reward_that_takes_too_long_is_undecided(function, responses, settings):
    grades, _ = graded(function, responses, settings=settings, timeout_seconds=0.2)
    assert grades[0].verdict is U and grades[0].reason == "no reward within 0.2 s"
    assert [grade.verdict for grade in grades[1:]] == [C] * (len(grades) - 1)


def test_calls_run_at_the_same_time_up_to_a_limit():
    running, most = 0, 0

    async def counted(**_):
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.01)
        running -= 1
        return True

    requests = [GradeRequest(question="", gold_answer="", response="", stopped=True)] * 20
    with build_verifier(VerifierConfig(num_workers=3), counted) as verifier:
        assert len(verifier.grade(requests)) == 20
    assert most == 3


def test_a_reward_without_the_keywords_is_refused():
    with pytest.raises(ConfigError) as caught:
        load_function("rollout.reward", FunctionConfig(path="json.dumps"), REWARD_PARAMETERS)
    (violation,) = caught.value.violations
    assert violation.key == "rollout.reward"
    assert "It is called with the keywords question, gold_answer, response, stopped" in violation.remedy
