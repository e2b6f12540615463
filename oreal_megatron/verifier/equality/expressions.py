"""Equality of two LaTeX expressions: exactly if possible, else to at least 60 digits at several points. Needs sympy."""

from __future__ import annotations

import math
import re
import sys
from fractions import Fraction

import mpmath
import sympy
from mpmath import mp

from oreal_megatron.types import Verdict
from oreal_megatron.verifier.equality.evaluate import CannotEvaluate, Undefined, evaluate
from oreal_megatron.verifier.input_limits import MAX_FACTORIAL, Refused
from oreal_megatron.verifier.latex.latex_fallback import read
from oreal_megatron.verifier.latex.latex_parser import Unreadable
from oreal_megatron.verifier.latex.normalize import text_key
from oreal_megatron.verifier.latex.rational import parse_rational
from oreal_megatron.verifier.outcome import Outcome, different, equal, unknown

DIGITS = 60
MAX_DIGITS = 4_000
MAX_INTEGRAND_OPERATIONS = 40
MAX_EXACT_BITS = 200_000
BITS_PER_DIGIT = 3.33
_HALF_OPEN = re.compile(r"\([^()\[\]]*,[^()\[\]]*\]|\[[^()\[\]]*,[^()\[\]]*\)")
_BARE_LOG = re.compile(r"\\log(?![A-Za-z])(?!\s*_)")
# The coordinates are irregular, so that no identity holds by accident, and have both signs, so that |x| differs from x.
_POINTS = ("0.73205", "-1.61827", "2.23719", "0.31871", "-0.57119", "3.14279", "1.41367", "-2.71913", "0.11293")
_WHOLE_POINTS = ("3", "5", "2", "7", "4", "6", "9", "8", "11")


def _names(*trees: sympy.Basic) -> list[str]:
    return sorted({symbol.name for tree in trees for symbol in tree.free_symbols} - {"i"})


def _points(names: list[str], whole: frozenset[str] = frozenset()) -> list[dict[str, str]]:
    """Returns points that give each name a value; the names in `whole` get natural numbers."""
    count = 1 if not names else 9
    return [
        {
            name: (_WHOLE_POINTS if name in whole else _POINTS)[
                (index * (2 * position + 1) + 3 * position) % len(_POINTS)
            ]
            for position, name in enumerate(names)
        }
        for index in range(count)
    ]


def _counted(*trees: sympy.Basic) -> frozenset[str]:
    """Returns names that stand for integers: in limits of sums; n, k etc. also under a floor or as a power of -1."""
    parts = [part for tree in trees for part in sympy.preorder_traversal(tree)]
    sums = [part for part in parts if isinstance(part, (sympy.Sum, sympy.Product))]
    ends = [end for part in sums for limit in part.limits for end in limit[1:]]
    steps = [part for part in parts if isinstance(part, _STEPS)]
    signs = [part.exp for part in parts if part.is_Pow and exact_value(part.base) == -1]
    inside = {symbol.name for part in (*steps, *signs) for symbol in part.free_symbols}
    return frozenset(symbol.name for end in ends for symbol in end.free_symbols) | (inside & _NAMES_OF_INTEGERS)


_STEPS = (sympy.floor, sympy.ceiling)
_NAMES_OF_INTEGERS = frozenset("ijklmnpqr")


def _all_points(gold: sympy.Basic, answer: sympy.Basic) -> list[dict[str, str]]:
    """Returns the points of a comparison; with floors also integers, at which floor and ceiling agree."""
    names = _names(gold, answer)
    points = _points(names, _counted(gold, answer))
    return points + _points(names, frozenset(names)) if names and (gold.has(*_STEPS) or answer.has(*_STEPS)) else points


def _agree(one: mpmath.mpf, other: mpmath.mpf, digits: int) -> bool:
    scale = max(abs(one), abs(other))
    return bool(scale == 0 or abs(one - other) <= scale * mpmath.mpf(10) ** (-digits * 3 // 4))


def _height(tree: sympy.Basic) -> float:
    """Returns an upper bound of the bits in the exact value of a rational tree; of other trees, of their numbers."""
    if tree.is_Integer:
        return float(int(tree.p).bit_length())
    if tree.is_Rational:
        return float(int(tree.p).bit_length() + int(tree.q).bit_length())
    if tree.is_Pow:
        exponent = exact_value(tree.exp)
        if tree.base.is_Symbol and tree.exp.is_Integer:
            return 0.0  # at the points the powers of a name are neither large nor close to each other
        times = 1.0 if exponent is None else max(1.0, abs(float(exponent)))
        return _height(tree.base) * times + _height(tree.exp)
    if isinstance(tree, _WHOLE_FUNCTIONS):
        value = exact_value(tree)
        return float(value.numerator.bit_length()) if value is not None else sum(map(_height, tree.args))
    return sum(map(_height, tree.args))


_WHOLE_FUNCTIONS = (sympy.factorial, sympy.binomial)


def _whole_function(tree: sympy.Basic, arguments: list[Fraction]) -> Fraction | None:
    """Returns a factorial or binomial of natural numbers exactly: 100! and 100!+1 agree in a hundred digits."""
    if any(value.denominator != 1 or not 0 <= value <= MAX_FACTORIAL for value in arguments):
        return None
    whole = [int(value) for value in arguments]
    return Fraction(math.factorial(*whole) if isinstance(tree, sympy.factorial) else math.comb(*whole))


def exact_value(tree: sympy.Basic) -> Fraction | None:
    """Returns the value of sums, products, integer powers, factorials of rational numbers; None for other trees."""
    if tree.is_Rational:
        return Fraction(int(tree.p), int(tree.q))
    if not (tree.is_Add or tree.is_Mul or tree.is_Pow or isinstance(tree, _WHOLE_FUNCTIONS)):
        return None
    values = [exact_value(part) for part in tree.args]
    if any(value is None for value in values):
        return None
    known = [value for value in values if value is not None]
    if tree.is_Add:
        return sum(known, Fraction(0))
    if tree.is_Mul:
        return math.prod(known, start=Fraction(1))
    if isinstance(tree, _WHOLE_FUNCTIONS):
        return _whole_function(tree, known)
    base, exponent = known
    if exponent.denominator != 1 or _height(tree.base) * abs(exponent) > MAX_EXACT_BITS:
        return None
    return None if base == 0 and exponent < 0 else base ** int(exponent)


def _precision(*trees: sympy.Basic) -> int:
    """Returns the digits of the first evaluation: more than those of the trees, so that 2^(2^-1000) differs from 1."""
    digits = DIGITS + int(max(map(_height, trees)) / BITS_PER_DIGIT)
    if digits > MAX_DIGITS:
        raise CannotEvaluate(f"numbers of more than {MAX_DIGITS} digits")
    return digits


def _same_at(gold: sympy.Basic, answer: sympy.Basic, point: dict[str, str], precision: int) -> bool | None:
    """Returns whether both are equal at the point; None if the gold answer is real but has no real value there."""
    differences = []
    for digits in (precision, 2 * precision):
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
            try:
                given = evaluate(answer, at)
            except Undefined:
                return None if point else False
            if not (mpmath.isfinite(wanted) and mpmath.isfinite(given)):
                return None
            if _agree(wanted, given, digits):
                return True
            differences.append(abs(wanted - given))
    # A difference that shrinks with the precision comes from the cancellation of equal values.
    return bool(differences[1] <= differences[0] * mpmath.mpf(10) ** (-precision // 2))


def _is_complex(tree: sympy.Basic) -> bool:
    return tree.has(sympy.I) or any(symbol.name == "i" for symbol in tree.free_symbols)


def _integrated(tree: sympy.Basic) -> sympy.Basic:
    """Computes polynomial integrals and derivatives; others stay as they are, since they may never end."""
    easy = {
        part: part.doit()
        for part in tree.atoms(sympy.Integral, sympy.Derivative)
        if part.args[0].is_polynomial(*part.args[0].free_symbols)
        and part.args[0].count_ops() < MAX_INTEGRAND_OPERATIONS
    }
    return tree.xreplace(easy) if easy else tree


def _is_endless(tree: sympy.Basic) -> bool:
    """Whether the tree holds an infinite sum or product, of which only the first terms are evaluated."""
    return any(limit[-1] is sympy.oo for part in tree.atoms(sympy.Sum, sympy.Product) for limit in part.limits)


_CONSTANT = re.compile(r"(?<![A-Za-z\\])([Cc])(?![A-Za-z(])(?=\s*(?:_|$))")


def _same_constants(gold: str, answer: str) -> str:
    r"""Renames constants of integration (`+c` at the end, `c_1`) if the gold answer uses C, or the reverse."""
    names = [set(_CONSTANT.findall(text)) for text in (gold, answer)]
    if names in ([{"C"}, {"c"}], [{"c"}, {"C"}]):
        return _CONSTANT.sub(names[0].pop(), answer)
    return answer


class SymbolicLeaves:
    """Compares expressions with sympy's trees."""

    max_chars = sys.maxsize

    def equal(self, gold: str, answer: str) -> Outcome:
        if text_key(gold) == text_key(answer):
            return equal("the same text")
        gold_value, answer_value = parse_rational(gold), parse_rational(answer)
        if gold_value is not None and answer_value is not None:
            return equal("the same number") if gold_value == answer_value else different("different numbers")
        answer = _same_constants(gold, answer)
        outcome = self._equal_texts(gold, answer)
        if outcome.verdict is not Verdict.CORRECT and _BARE_LOG.search(gold + answer):
            # A bare \log is the common or the natural logarithm, but the same on both sides.
            natural = self._equal_texts(_BARE_LOG.sub(r"\\ln", gold), _BARE_LOG.sub(r"\\ln", answer))
            return natural if natural.verdict is Verdict.CORRECT else outcome
        return outcome

    def _equal_texts(self, gold: str, answer: str) -> Outcome:
        try:
            gold_tree = read(gold)
        except (Refused, Unreadable) as error:
            if _HALF_OPEN.search(gold) and parse_rational(answer) is not None:
                return different("a number where the gold answer holds an interval")
            return unknown(f"the gold answer cannot be read: {error}")
        is_number = parse_rational(gold) is not None
        try:
            answer_tree = read(answer)
        except Unreadable as error:
            return different(f"not a readable expression: {error}")
        except Refused as error:
            reason = f"refused: {error}"
            return different(f"{reason}, for a plain number") if is_number else unknown(reason)
        outcome = self.equal_trees(gold_tree, answer_tree)
        if is_number and outcome.verdict is Verdict.UNDECIDED:
            return different(f"no closed form, for a plain number: {outcome.reason}")
        return outcome

    def equal_trees(self, gold: sympy.Basic, answer: sympy.Basic) -> Outcome:
        """Returns whether two trees have the same value."""
        gold, answer = _integrated(gold), _integrated(answer)
        if gold == answer:
            return equal("the same expression")
        if answer.has(sympy.zoo, sympy.nan):
            return different("the answer has no value")
        if _is_endless(gold) != _is_endless(answer):
            return unknown("an endless sum against something else")
        if not _is_endless(gold) and (gold.has(sympy.oo, -sympy.oo) or answer.has(sympy.oo, -sympy.oo)):
            return different("an infinity against another value")
        gold_value, answer_value = exact_value(gold), exact_value(answer)
        if gold_value is not None and answer_value is not None:
            return equal("the same number") if gold_value == answer_value else different("different numbers")
        decided = 0
        try:
            precision = _precision(gold, answer)
            for point in _all_points(gold, answer):
                same = _same_at(gold, answer, point, precision)
                if same is False:
                    return different("different values")
                decided += same is True
        except CannotEvaluate as error:
            return unknown(f"no numeric comparison: {error}")
        if decided == 0:
            return unknown("no point where both sides have a value")
        return equal(f"equal to {precision} digits")

    def proportional(self, gold: tuple[str, str], answer: tuple[str, str]) -> Outcome:
        """Returns whether the differences of the sides of two equations have a constant, non-zero quotient."""
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
            same = all(
                abs(quotient - quotients[0]) < abs(quotients[0]) * mpmath.mpf(10) ** -40 for quotient in quotients
            )
        return equal("the same equation") if same else different("different equations")

    def real_value(self, latex: str) -> mpmath.mpf | None:
        """Returns the value of a constant, which orders the ends of intervals; None if it has no real value."""
        try:
            with mp.workdps(DIGITS):
                number = evaluate(read(latex), {})
                return None if isinstance(number, mpmath.mpc) else mpmath.mpf(number)
        except (Refused, Unreadable, CannotEvaluate):
            return None
