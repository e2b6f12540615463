"""Comparison of single expressions, the leaves of a parsed answer, and its fast implementation for plain numbers."""

from __future__ import annotations

from typing import Any, Protocol

from oreal_megatron.verifier.latex.normalize import text_key
from oreal_megatron.verifier.latex.rational import parse_rational
from oreal_megatron.verifier.outcome import Outcome, different, equal


class Leaves(Protocol):
    """Compares single expressions."""

    max_chars: int
    """Length of the longest answer that this implementation compares in reasonable time."""

    def equal(self, gold: str, answer: str) -> Outcome:
        """Returns whether two expressions have the same value."""
        ...

    def proportional(self, gold: tuple[str, str], answer: tuple[str, str]) -> Outcome:
        """Returns whether `gold[0] = gold[1]` and `answer[0] = answer[1]` are one equation up to a constant factor."""
        ...

    def real_value(self, latex: str) -> Any:
        """Returns the value of a constant as a number that can be ordered, or None if it has no real value."""
        ...


class NeedsSympy(Exception):
    """Raised for an expression that is not a plain number; a worker with sympy compares it."""


class RationalLeaves:
    """Compares plain numbers exactly, in the calling process. Raises NeedsSympy for every other expression."""

    max_chars = 400

    def equal(self, gold: str, answer: str) -> Outcome:
        if text_key(gold) == text_key(answer):
            return equal("the same text")
        gold_value, answer_value = parse_rational(gold), parse_rational(answer)
        if gold_value is None or answer_value is None:
            raise NeedsSympy
        return equal("the same number") if gold_value == answer_value else different("different numbers")

    def proportional(self, gold: tuple[str, str], answer: tuple[str, str]) -> Outcome:
        raise NeedsSympy

    def real_value(self, latex: str) -> object:
        value = parse_rational(latex)
        if value is None:
            raise NeedsSympy
        return value
