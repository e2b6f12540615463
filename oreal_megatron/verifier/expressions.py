"""Whether two LaTeX expressions are equal: exact first, then to 60 digits at several points. Needs sympy.

latex2sympy2_extended is the parser and nothing more; text reaches it only after `guards.check_expression`.
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache

import mpmath
import sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
from mpmath import mp

from oreal_megatron.verifier.evaluate import CannotEvaluate, evaluate
from oreal_megatron.verifier.guards import Refused, check_expression
from oreal_megatron.verifier.outcome import Outcome, different, equal, unknown
from oreal_megatron.verifier.rational import parse_rational

DIGITS = 60
CHECK_DIGITS = 120
MAX_TREE_NODES = 3_000
# Irregular on purpose: no identity holds at these by accident. Signs vary, so that |x| differs from x.
_POINTS = ("0.73205", "-1.61827", "2.23719", "0.31871", "-0.57119", "3.14279", "1.41367", "-2.71913", "0.11293")

_CONFIG = ConversionConfig(interpret_as_mixed_fractions=True, lowercase_symbols=False)
_DECIMAL = re.compile(r"(?<![\d.])(\d*\.\d+|\d+\.(?!\.))")
_REPEATING = re.compile(r"\d*\.\d*\\overline\s*\{\s*\d+\s*\}")
_UNBRACED_POWER = re.compile(r"\^\s*(\d)(?=\d)")
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")


_NOT_EXPRESSIONS = (sympy.Set, sympy.Tuple, sympy.core.relational.Relational, sympy.logic.boolalg.BooleanFunction)


class Unreadable(ValueError):
    """The parser does not accept the text."""


def _decimal_to_fraction(text: str) -> str:
    value = parse_rational(text)
    return text if value is None else f"(\\frac{{{value.numerator}}}{{{value.denominator}}})"


def _prepare(latex: str) -> str:
    """Decimals as exact fractions, LaTeX's own reading of `2^10`, names that the grammar lacks."""
    latex = _REPEATING.sub(lambda m: _decimal_to_fraction(m[0]), latex)
    latex = _THOUSANDS.sub(lambda m: m[0].replace(",", ""), latex)
    latex = _DECIMAL.sub(lambda m: _decimal_to_fraction(m[0]), latex)
    latex = _UNBRACED_POWER.sub(r"^{\1} \\cdot ", latex)
    latex = re.sub(r"(\d+|\))\s*\\degree(?![A-Za-z])", r"\1 \\cdot \\frac{\\pi}{180} ", latex)
    latex = re.sub(r"\\(hbar|ell|prime|nabla|Re|Im)(?![A-Za-z])", r"\\text{\1}", latex)
    latex = re.sub(r"\\text\s*\{\s*([^{}]*?)\s*\}", lambda m: _as_symbol(m[1]), latex)
    return latex.replace("*", r"\cdot ").replace("!", " ! ").strip()


def _as_symbol(words: str) -> str:
    letters = re.sub(r"[^A-Za-z]", "", words)
    return f" t_{{{letters}}} " if letters else " "


@lru_cache(maxsize=4_096)
def read(latex: str) -> sympy.Basic:
    """The tree of an expression. Raises Refused or Unreadable."""
    check_expression(latex)
    value = parse_rational(latex)
    if value is not None:
        return sympy.Rational(value.numerator, value.denominator)
    try:
        tree = latex2sympy(_prepare(latex), is_real=None, normalization_config=None, conversion_config=_CONFIG)
    except (MemoryError, RecursionError):
        raise
    except Exception as error:  # the parser raises bare Exception for every syntax error
        raise Unreadable(str(error).splitlines()[0][:100] if str(error) else type(error).__name__) from None
    if not isinstance(tree, sympy.Basic) or isinstance(tree, _NOT_EXPRESSIONS):
        raise Unreadable("not a single expression")
    if sum(1 for _ in sympy.preorder_traversal(tree)) > MAX_TREE_NODES:
        raise Refused(f"an expression of more than {MAX_TREE_NODES} parts")
    if tree.has(sympy.nan, sympy.zoo):
        raise Unreadable("an indeterminate form")
    return tree


def _names(*trees: sympy.Basic) -> list[str]:
    return sorted({symbol.name for tree in trees for symbol in tree.free_symbols} - {"i"})


def _points(names: list[str]) -> list[dict[str, str]]:
    count = 1 if not names else 9
    return [
        {name: _POINTS[(index * (2 * position + 1) + 3 * position) % len(_POINTS)] for position, name in enumerate(names)}
        for index in range(count)
    ]


def _agree(one: mpmath.mpf, other: mpmath.mpf, digits: int) -> bool:
    scale = max(abs(one), abs(other))
    return bool(scale == 0 or abs(one - other) <= scale * mpmath.mpf(10) ** (-digits * 3 // 4))


def _same_at(gold: sympy.Basic, answer: sympy.Basic, point: dict[str, str]) -> bool | None:
    """Equality at one point; None where the gold has no real value there and none was asked for."""
    differences = []
    for digits in (DIGITS, CHECK_DIGITS):
        with mp.workdps(digits + 15):
            at = {name: mpmath.mpf(value) for name, value in point.items()}
            try:
                wanted = evaluate(gold, at)
            except CannotEvaluate:
                if point:
                    return None
                raise
            if point and isinstance(wanted, mpmath.mpc) and abs(wanted.imag) > 1e-30 and not _is_complex(gold):
                return None
            given = evaluate(answer, at)
            if not (mpmath.isfinite(wanted) and mpmath.isfinite(given)):
                return None
            if _agree(wanted, given, digits):
                return True
            differences.append(abs(wanted - given))
    # A difference that shrinks with the precision is cancellation of equal values, not a difference.
    return bool(differences[1] <= differences[0] * mpmath.mpf(10) ** (-DIGITS // 2))


def _is_complex(tree: sympy.Basic) -> bool:
    return tree.has(sympy.I) or any(symbol.name == "i" for symbol in tree.free_symbols)


class SymbolicLeaves:
    """Compares expressions with sympy's trees."""

    def equal(self, gold: str, answer: str) -> Outcome:
        if gold.replace(" ", "") == answer.replace(" ", ""):
            return equal("the same text")
        gold_value, answer_value = parse_rational(gold), parse_rational(answer)
        if gold_value is not None and answer_value is not None:
            return equal("the same number") if gold_value == answer_value else different("different numbers")
        try:
            gold_tree = read(gold)
        except (Refused, Unreadable) as error:
            return unknown(f"the gold answer cannot be read: {error}")
        try:
            answer_tree = read(answer)
        except Unreadable as error:
            return different(f"not a readable expression: {error}")
        except Refused as error:
            return unknown(f"refused: {error}")
        return self._equal_trees(gold_tree, answer_tree)

    def _equal_trees(self, gold: sympy.Basic, answer: sympy.Basic) -> Outcome:
        if gold == answer:
            return equal("the same expression")
        if gold.is_Rational and answer.is_Rational:
            return different("different numbers")
        decided = 0
        try:
            for point in _points(_names(gold, answer)):
                same = _same_at(gold, answer, point)
                if same is False:
                    return different("different values")
                decided += same is True
        except CannotEvaluate as error:
            return unknown(f"no numeric comparison: {error}")
        if decided == 0:
            return unknown("no point where both sides have a value")
        return equal(f"equal to {DIGITS} digits")

    def proportional(self, gold: tuple[str, str], answer: tuple[str, str]) -> Outcome:
        """Whether two equations say the same: their differences of sides have a constant, non-zero quotient."""
        try:
            wanted, given = read(gold[0]) - read(gold[1]), read(answer[0]) - read(answer[1])
        except (Refused, Unreadable) as error:
            return unknown(f"an equation cannot be read: {error}")
        names = _names(wanted, given)
        if not names or set(_names(wanted)) != set(_names(given)):
            return different("equations in different variables")
        quotients = []
        with mp.workdps(DIGITS):
            for point in _points(names):
                at = {name: mpmath.mpf(value) for name, value in point.items()}
                try:
                    top, bottom = evaluate(wanted, at), evaluate(given, at)
                except CannotEvaluate:
                    continue
                if bottom == 0 or top == 0:
                    continue
                quotients.append(top / bottom)
            if len(quotients) < 3:
                return unknown("the equations have no common points to compare")
            same = all(abs(quotient - quotients[0]) < abs(quotients[0]) * mpmath.mpf(10) ** -40 for quotient in quotients)
        return equal("the same equation") if same else different("different equations")

    def real_value(self, latex: str) -> Fraction | mpmath.mpf | None:
        """The value of a constant, to order the ends of intervals; None for what has none."""
        value = parse_rational(latex)
        if value is not None:
            return value
        try:
            with mp.workdps(DIGITS):
                number = evaluate(read(latex), {})
                return None if isinstance(number, mpmath.mpc) else number
        except (Refused, Unreadable, CannotEvaluate):
            return None
