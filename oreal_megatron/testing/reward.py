"""The check of a reward of one's own: what a run needs of it, whatever the responses are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from oreal_megatron.config import FunctionConfig
from oreal_megatron.extensions import REWARD_PARAMETERS, load_function
from oreal_megatron.types import Grade, GradeRequest, Verdict
from oreal_megatron.verifier.own_reward import grades_of

_CONCURRENCY = 4
"""Calls at a time, as a verifier of four workers makes them."""
_ODD_RESPONSES = ("", " ", "\n", "\0", "\ufffd\u202e", "-" * 100_000, "\\boxed{" * 50, "nan", "1e999", "[]", "None")
"""Responses that a policy may write, and that no reward may raise at."""


@dataclass(frozen=True, kw_only=True)
class RewardCase:
    """A response, and the credit that it gets."""

    question: str
    gold_answer: str
    response: str
    """Text without the stop token."""
    stopped: bool = True
    """Whether the response ends with the stop token."""
    credit: float | None
    """Credit in [0, 1], 1 for CORRECT; None: UNDECIDED, since the reward is None."""


def check_reward(
    path: str,
    cases: Sequence[RewardCase],
    *,
    settings: Mapping[str, Any] | None = None,
    seconds: float = 10.0,
    tolerance: float = 1e-6,
) -> None:
    """Checks a function for rollout.reward on cases, and on odd responses to their questions.

    - Each case has its credit, within `tolerance`.
    - A second call, in another order and with other calls at the same time, gives the same reward.
    - Every call ends within `seconds`, and returns a bool, a number in [0, 1] or None. None raises, also not at
      responses that are empty, long, cut off, or have characters that are no text.

    path: the function, as `module.name`. settings: values of the model of its parameter `settings`.

    Raises:
        ConfigError: the function cannot be imported or called, or the settings are wrong.
        AssertionError: a check fails. The message has all that fail.
    """
    config = FunctionConfig(path=path, settings=settings or {})
    reward = load_function("rollout.reward", config, REWARD_PARAMETERS)
    requests = [
        GradeRequest(question=c.question, gold_answer=c.gold_answer, response=c.response, stopped=c.stopped)
        for c in cases
    ]
    odd = [
        GradeRequest(question=case.question, gold_answer=case.gold_answer, response=response, stopped=stopped)
        for case in cases[:2]
        for response in _ODD_RESPONSES
        for stopped in (True, False)
    ]
    every = [*requests, *odd]
    first = grades_of(reward, every, seconds=seconds, concurrency=1)
    second = grades_of(reward, every[::-1], seconds=seconds, concurrency=_CONCURRENCY)[::-1]
    faults = [
        *_faults_of_cases(cases, first, tolerance),
        *_faults_of_calls(every, first),
        *(
            f"{_shown(request)}: {one.reason} at the first call, and {other.reason} at the second"
            for request, one, other in zip(every, first, second, strict=True)
            if (one.verdict, one.credit) != (other.verdict, other.credit)
        ),
    ]
    assert not faults, f"the reward {path} fails:\n" + "\n".join(f"  - {fault}" for fault in dict.fromkeys(faults))


def _faults_of_cases(cases: Sequence[RewardCase], grades: Sequence[Grade], tolerance: float) -> Iterator[str]:
    for case, grade in zip(cases, grades[: len(cases)], strict=True):
        what = f"the response {case.response[:60]!r} to {case.question[:60]!r}"
        credit = float(grade.verdict is Verdict.CORRECT) if grade.credit is None else grade.credit
        if case.credit is None and grade.verdict is not Verdict.UNDECIDED:
            yield f"{what} has the credit {credit:g}, and None is expected"
        elif case.credit is not None and grade.verdict is Verdict.UNDECIDED:
            yield f"{what} is UNDECIDED ({grade.reason}), and the credit {case.credit:g} is expected"
        elif case.credit is not None and abs(credit - case.credit) > tolerance:
            yield f"{what} has the credit {credit:g}, and {case.credit:g} is expected"


def _faults_of_calls(requests: Sequence[GradeRequest], grades: Sequence[Grade]) -> Iterator[str]:
    for request, grade in zip(requests, grades, strict=True):
        if grade.verdict is Verdict.UNDECIDED and grade.reason != "the reward is None":
            yield f"{_shown(request)}: {grade.reason}"


def _shown(request: GradeRequest) -> str:
    ending = "" if request.stopped else " without the stop token"
    return f"the response {request.response[:60]!r}{ending}"
