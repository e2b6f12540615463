"""Three-valued comparison: equal, different, or not known, with the reason."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from oreal_megatron.types import Verdict

RULES, GUARD = "rules", "guard"
"""Stages of the comparison. What a guard rejects is final: no judge may bring it back."""


class Outcome(NamedTuple):
    """What a comparison found."""

    verdict: Verdict
    reason: str
    stage: str = RULES


def equal(reason: str) -> Outcome:
    """Both are the same answer."""
    return Outcome(Verdict.CORRECT, reason)


def different(reason: str) -> Outcome:
    """They are different answers."""
    return Outcome(Verdict.INCORRECT, reason)


def unknown(reason: str) -> Outcome:
    """The rules cannot tell."""
    return Outcome(Verdict.UNDECIDED, reason)


def rejected(reason: str) -> Outcome:
    """No honest answer, whatever value it may hold."""
    return Outcome(Verdict.INCORRECT, reason, GUARD)


def all_of(outcomes: Iterable[Outcome], reason: str) -> Outcome:
    """Equal where all are; different as soon as one is."""
    doubt: Outcome | None = None
    for outcome in outcomes:
        if outcome.verdict is Verdict.INCORRECT:
            return outcome
        if outcome.verdict is Verdict.UNDECIDED:
            doubt = doubt or outcome
    return doubt or equal(reason)


def any_of(outcomes: Iterable[Outcome], reason: str) -> Outcome:
    """Equal as soon as one is; different where all are."""
    doubt: Outcome | None = None
    for outcome in outcomes:
        if outcome.verdict is Verdict.CORRECT:
            return outcome
        if outcome.verdict is Verdict.UNDECIDED:
            doubt = doubt or outcome
    return doubt or different(reason)
