"""Outcomes of comparisons: equal, different, or unknown, each with its reason."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from oreal_megatron.types import Verdict

RULES, GUARD = "rules", "guard"
"""Stages of the comparison. A rejection by the guard is final: no judge may overrule it."""


class Outcome(NamedTuple):
    """The result of a comparison."""

    verdict: Verdict
    reason: str
    stage: str = RULES


def equal(reason: str) -> Outcome:
    """Returns the outcome of two answers that are equal."""
    return Outcome(Verdict.CORRECT, reason)


def different(reason: str) -> Outcome:
    """Returns the outcome of two answers that differ."""
    return Outcome(Verdict.INCORRECT, reason)


def unknown(reason: str) -> Outcome:
    """Returns the outcome of two answers that the rules cannot decide."""
    return Outcome(Verdict.UNDECIDED, reason)


def rejected(reason: str) -> Outcome:
    """Returns the final outcome of a text that is no honest answer, whatever value it holds."""
    return Outcome(Verdict.INCORRECT, reason, GUARD)


def all_of(outcomes: Iterable[Outcome], reason: str) -> Outcome:
    """Returns equal if all outcomes are equal, different as soon as one is different."""
    doubt: Outcome | None = None
    for outcome in outcomes:
        if outcome.verdict is Verdict.INCORRECT:
            return outcome
        if outcome.verdict is Verdict.UNDECIDED:
            doubt = doubt or outcome
    return doubt or equal(reason)


def any_of(outcomes: Iterable[Outcome], reason: str) -> Outcome:
    """Returns equal as soon as one outcome is equal, different if all are different."""
    doubt: Outcome | None = None
    for outcome in outcomes:
        if outcome.verdict is Verdict.CORRECT:
            return outcome
        if outcome.verdict is Verdict.UNDECIDED:
            doubt = doubt or outcome
    return doubt or different(reason)
