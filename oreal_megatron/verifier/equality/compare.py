"""Comparison of two parsed answers by their shapes; `Leaves` compares the single expressions in them."""

from __future__ import annotations

import re
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from typing import Any

from oreal_megatron.types import Verdict
from oreal_megatron.verifier.equality.intervals import IntervalComparison
from oreal_megatron.verifier.equality.leaves import Leaves
from oreal_megatron.verifier.equality.words import compare_words, prose_for_value
from oreal_megatron.verifier.latex.node_queries import (
    NUMBER_SET,
    REVERSIBLE,
    amount_of,
    are_indexed_roots,
    as_fraction,
    in_alphabet,
    is_braced,
    is_computed_sum,
    is_interval,
    is_measured,
    is_reducible_residue,
    is_set_like,
    latex_of,
    modulus_of,
    names_of,
    parts_of,
    quotient_of,
    rename_argument,
    reversed_relation,
    same_time_of_day,
    with_unit_letter,
)
from oreal_megatron.verifier.latex.nodes import (
    Based,
    Bracketed,
    Collection,
    Leaf,
    Matrix,
    Node,
    Ratio,
    Relation,
    SetOperation,
    Text,
)
from oreal_megatron.verifier.latex.normalize import text_key
from oreal_megatron.verifier.latex.units_and_words import DEGREES, PERCENT, is_prose
from oreal_megatron.verifier.latex.variable_names import is_constant, named_parts, strip_name
from oreal_megatron.verifier.outcome import Outcome, all_of, any_of, different, equal, unknown

_VARIABLE = re.compile(r"[A-Za-z]|\\[A-Za-z]+")


_SAME_VALUE = 1e-40
"""Difference of two values up to which they count as the same."""
_MANY_PARTS = 12
"""Number of parts from which lists are compared in the order of their values first."""


class AnswerComparison:
    """Compares a gold answer with an answer; single expressions by means of `leaves`."""

    def __init__(self, leaves: Leaves) -> None:
        self.leaves = leaves
        self.intervals = IntervalComparison(leaves)

    def compare(self, gold: Node, answer: Node) -> Outcome:
        """Returns whether the two are equal, different, or beyond these rules."""
        if isinstance(gold, Text) or isinstance(answer, Text):
            return compare_words(gold, answer)
        if is_set_like(gold) or is_set_like(answer):
            outcome = self.intervals.compare(gold, answer)
            if outcome is not None:
                return outcome
        if isinstance(gold, Relation) or isinstance(answer, Relation):
            return self._relations(gold, answer)
        if isinstance(gold, (Collection, Bracketed, Matrix)) or isinstance(answer, (Collection, Bracketed, Matrix)):
            return self._several(gold, answer)
        if isinstance(gold, SetOperation) or isinstance(answer, SetOperation):
            return self._operations(gold, answer)
        if isinstance(gold, Ratio) or isinstance(answer, Ratio):
            return self._ratios(gold, answer)
        if isinstance(gold, Based) or isinstance(answer, Based):
            return self._based(gold, answer)
        return self._leaves(gold, answer)

    def _relations(self, gold: Node, answer: Node) -> Outcome:
        if isinstance(answer, Relation):
            broken = self._false_chain(answer)
            if broken is not None:
                return broken
        if isinstance(gold, Relation) and isinstance(answer, Relation):
            return self._two_relations(gold, answer)
        if isinstance(answer, Relation):
            value = strip_name(answer)
            if value is not None and not is_reducible_residue(answer, value):
                return self.compare(gold, value)
            if is_computed_sum(answer):
                return self.compare(gold, answer.items[-1])
            if is_measured(answer) and self.compare(gold, answer.items[1]).verdict is Verdict.CORRECT:
                return unknown("the value of an expression, which may or may not be what was asked for")
            return different("an equation or inequality where the gold answer is a value")
        assert isinstance(gold, Relation)
        if is_computed_sum(gold):
            return self.compare(gold.items[-1], answer)
        value = strip_name(gold)
        return (
            different("the gold answer is a relation, the answer is not")
            if value is None
            else self.compare(value, answer)
        )

    def _false_chain(self, relation: Relation) -> Outcome | None:
        """Returns an outcome for an answer such as `6 = 5`, which states a falsehood, else None."""
        if set(relation.operators) - {"=", "~"}:
            return None
        for left, right, operator in zip(relation.items, relation.items[1:], relation.operators, strict=False):
            if not (is_constant(left) and is_constant(right)):
                continue
            if operator == "~" and not self._is_rounded(left, right):
                return different("the answer states a wrong approximation")
            if operator == "=" and self.compare(left, right).verdict is Verdict.INCORRECT:
                return different("the answer states a false equality")
        return None

    def _is_rounded(self, exact: Node, rounded: Node) -> bool:
        """Whether a decimal is within one unit of its last digit; true for expressions that are no decimals."""
        latex = latex_of(rounded) or ""
        if not isinstance(exact, Leaf) or not re.fullmatch(r"-?\d+(?:\.\d*)?", latex):
            return True
        value, given = self.leaves.real_value(exact.latex), self.leaves.real_value(latex)
        places = len(latex.partition(".")[2])
        return value is None or abs(value - given) * 10**places < 1

    def _two_relations(self, gold: Relation, answer: Relation) -> Outcome:
        gold_value, answer_value = strip_name(gold), strip_name(answer)
        outcomes = []
        if gold_value is not None and answer_value is not None:
            outcomes.append(self._two_named(gold, answer, gold_value, answer_value))
            if outcomes[0].verdict is Verdict.CORRECT:
                return outcomes[0]
        if gold.operators == answer.operators == ("=",):
            sides = [latex_of(item) for item in (*gold.items, *answer.items)]
            if all(side is not None for side in sides):
                return self.leaves.proportional((sides[0] or "", sides[1] or ""), (sides[2] or "", sides[3] or ""))
        if outcomes:
            return outcomes[0]
        readings = [(answer.items, answer.operators)]
        if set(answer.operators) <= REVERSIBLE:
            readings.append(reversed_relation(answer))
        for items, operators in readings:
            if operators == gold.operators and len(items) == len(gold.items):
                outcome = all_of(map(self.compare, gold.items, items), "the same relation")
                if outcome.verdict is not Verdict.INCORRECT:
                    return outcome
        return different("different relations")

    def _two_named(self, gold: Relation, answer: Relation, gold_value: Node, answer_value: Node) -> Outcome:
        if modulus_of(gold) != modulus_of(answer):
            return different("different moduli")
        if gold.operators == ("mod",):
            return self._residues(gold_value, answer_value, modulus_of(gold) or "")
        wanted, given = names_of(gold.items[0]), names_of(answer.items[0])
        if (
            isinstance(answer_value, Bracketed)
            and sorted(wanted) == sorted(given)
            and len(given) == len(answer_value.parts)
        ):
            # (y, x) = (2, 1) is (x, y) = (1, 2)
            answer_value = replace(answer_value, parts=tuple(answer_value.parts[given.index(name)] for name in wanted))
        gold_name, answer_name = latex_of(gold.items[0]), latex_of(answer.items[0])
        if gold_name != answer_name and gold_name and answer_name:
            renamed = rename_argument(answer_name, gold_name, answer_value)
            if renamed is not None:
                return self.compare(gold_value, renamed)
            if _VARIABLE.fullmatch(gold_name) and _VARIABLE.fullmatch(answer_name):
                return different("values of different variables")
        return self.compare(gold_value, answer_value)

    def _residues(self, gold: Node, answer: Node, modulus: str) -> Outcome:
        """Compares residues: 17 and 5 are the same modulo 12."""
        values = [node.value for node in (gold, answer) if isinstance(node, Leaf) and node.value is not None]
        if len(values) < 2 or not modulus.isdigit() or int(modulus) == 0:
            return self.compare(gold, answer)
        same = (values[0] - values[1]) % int(modulus) == 0
        return equal("the same residue") if same else different("different residues")

    def _several(self, gold: Node, answer: Node) -> Outcome:
        if isinstance(gold, Matrix) and isinstance(answer, Matrix):
            return self._matrices(gold, answer)
        if isinstance(gold, Collection) != isinstance(answer, Collection):
            for one, other in ((gold, answer), (answer, gold)):
                if isinstance(one, Collection) and len(one.parts) == 1:  # a set of one is that one
                    return self.compare(one.parts[0], other) if one is gold else self.compare(other, one.parts[0])
        amounts = [amount_of(node) for node in (gold, answer)]
        if amounts[0] is not None and amounts[1] is not None and amounts[0][1] == amounts[1][1]:
            return equal("the same quantity") if amounts[0] == amounts[1] else different("different quantities")
        gold_parts, answer_parts = parts_of(gold), parts_of(answer)
        if gold_parts is None and answer_parts is None:
            return different("a matrix against something else")
        if gold_parts is None or answer_parts is None:
            return self._one_against_many(gold, answer, gold_parts, answer_parts)
        if len(gold_parts) != len(answer_parts) and not (is_braced(gold) or is_braced(answer)):
            return different(f"{len(answer_parts)} values where the gold answer has {len(gold_parts)}")
        gold_named, answer_named = named_parts(gold), named_parts(answer)
        if gold_named and answer_named and set(gold_named) == set(answer_named):
            return all_of((self.compare(gold_named[k], answer_named[k]) for k in gold_named), "the same named values")
        if answer_named and not isinstance(gold, (Bracketed, Matrix)) and are_indexed_roots(answer_named):
            return self._unordered(gold_parts, tuple(answer_named.values()), as_set=is_braced(gold))
        if gold_named and not isinstance(answer, (Bracketed, Matrix)) and are_indexed_roots(gold_named):
            return self._unordered(tuple(gold_named.values()), answer_parts, as_set=is_braced(answer))
        if gold_named or answer_named:
            if gold_named and answer_named:
                return self._in_order(tuple(gold_named.values()), tuple(answer_named.values()))
            gold_values = tuple(in_alphabet(gold_named).values()) if gold_named else gold_parts
            answer_values = tuple(in_alphabet(answer_named).values()) if answer_named else answer_parts
            return self._in_order(gold_values, answer_values)
        if isinstance(gold, (Bracketed, Matrix)) or isinstance(answer, (Bracketed, Matrix)):
            return self._ordered(gold, answer, gold_parts, answer_parts)
        return self._unordered(gold_parts, answer_parts, as_set=is_braced(gold) or is_braced(answer))

    def _ordered(
        self, gold: Node, answer: Node, gold_parts: tuple[Node, ...], answer_parts: tuple[Node, ...]
    ) -> Outcome:
        if is_braced(gold) or is_braced(answer):
            return different("a set against an ordered tuple")
        if isinstance(answer, Collection) and isinstance(gold, Bracketed) and is_interval(gold):
            return different("an interval without its brackets")
        if isinstance(gold, Bracketed) and isinstance(answer, Bracketed):
            brackets = {(n.opening, n.closing) for n in (gold, answer)}
            if len(brackets) > 1 and brackets != {("(", ")"), ("\\langle", "\\rangle")}:
                return different("different brackets")
        return self._in_order(gold_parts, answer_parts)

    def _in_order(self, gold: tuple[Node, ...], answer: tuple[Node, ...]) -> Outcome:
        if len(gold) != len(answer):
            return different(f"{len(answer)} values where the gold answer has {len(gold)}")
        return all_of(map(self.compare, gold, answer), "the same values in order")

    def _one_against_many(
        self, gold: Node, answer: Node, gold_parts: tuple[Node, ...] | None, answer_parts: tuple[Node, ...] | None
    ) -> Outcome:
        if answer_parts is not None and len(answer_parts) == 1:
            return self.compare(gold, answer_parts[0])
        if gold_parts is not None and len(gold_parts) == 1:
            return self.compare(gold_parts[0], answer)
        if answer_parts is not None:
            return different(f"{len(answer_parts)} values where the gold answer has one")
        return different(f"one value where the gold answer has {len(gold_parts or ())}")

    def _matrices(self, gold: Matrix, answer: Matrix) -> Outcome:
        if (len(gold.rows), len(gold.rows[0])) != (len(answer.rows), len(answer.rows[0])):
            return different("matrices of different shape")
        cells = [[cell for row in matrix.rows for cell in row] for matrix in (gold, answer)]
        return all_of(map(self.compare, *cells), "the same matrix")

    def _unordered(self, gold: tuple[Node, ...], answer: tuple[Node, ...], as_set: bool) -> Outcome:
        if len(gold) == len(answer) >= _MANY_PARTS:
            sorted_parts = [self._by_value(parts) for parts in (gold, answer)]
            if sorted_parts[0] is not None and sorted_parts[1] is not None:
                return self._in_order(sorted_parts[0], sorted_parts[1])
        remaining = list(answer)
        for wanted in gold:
            outcomes = [self.compare(wanted, candidate) for candidate in remaining]
            verdicts = [outcome.verdict for outcome in outcomes]
            if Verdict.CORRECT in verdicts:
                if not as_set:
                    del remaining[verdicts.index(Verdict.CORRECT)]
            elif Verdict.UNDECIDED in verdicts:
                return outcomes[verdicts.index(Verdict.UNDECIDED)]
            else:
                return different("a value of the gold answer is missing")
        if as_set:
            extra = [
                any_of((self.compare(wanted, given) for wanted in gold), "not in the gold set") for given in answer
            ]
            return all_of(extra, "the same set")
        return equal("the same values")

    def _by_value(self, parts: tuple[Node, ...]) -> tuple[Node, ...] | None:
        """Sorts constants by their value; None if a part has none, or two parts have the same."""
        values: list[Any] = [self.leaves.real_value(part.latex) if isinstance(part, Leaf) else None for part in parts]
        if any(value is None for value in values):
            return None
        order = sorted(range(len(parts)), key=lambda index: values[index])
        if any(values[after] - values[before] <= _SAME_VALUE for before, after in pairwise(order)):
            return None
        return tuple(parts[index] for index in order)

    def _operations(self, gold: Node, answer: Node) -> Outcome:
        if (
            not (isinstance(gold, SetOperation) and isinstance(answer, SetOperation))
            or gold.operator != answer.operator
        ):
            return different("different sets")
        if gold.operator == "difference":
            return self._in_order(gold.parts, answer.parts)
        return self._unordered(gold.parts, answer.parts, as_set=True)

    def _ratios(self, gold: Node, answer: Node) -> Outcome:
        if isinstance(gold, Ratio) and isinstance(answer, Ratio):
            exact = self._in_order(gold.parts, answer.parts)
            if exact.verdict is not Verdict.INCORRECT or len(gold.parts) != len(answer.parts):
                return exact
            if gold.clock and answer.clock:  # 2:30 is no multiple of 1:15
                return equal("the same time of day") if same_time_of_day(gold, answer) else exact
            quotients = [
                self.leaves.equal(quotient_of(gold, index), quotient_of(answer, index))
                for index in range(1, len(gold.parts))
            ]
            return all_of(quotients, "the same ratio")
        ratio = gold if isinstance(gold, Ratio) else answer
        assert isinstance(ratio, Ratio)
        if len(ratio.parts) != 2 or latex_of(ratio.parts[1]) in (None, "00", "0"):
            return different("a ratio or time against a number")
        quotient = Leaf(quotient_of(ratio, 1))
        return self._leaves(quotient, answer) if ratio is gold else self._leaves(gold, quotient)

    def _based(self, gold: Node, answer: Node) -> Outcome:
        if isinstance(gold, Based) and isinstance(answer, Based):
            same = int(gold.digits, gold.base) == int(answer.digits, answer.base)
            return equal("the same number") if same else different("different numbers")
        if isinstance(gold, Based):
            # Without its base the numeral is read in the base that was asked for, as a missing unit would be.
            latex = latex_of(answer) or ""
            same = latex.upper().lstrip("0") == gold.digits
            return equal("the same digits, base left out") if same else different("different digits")
        assert isinstance(answer, Based)
        return self._leaves(gold, Leaf(str(int(answer.digits, answer.base)), Fraction(int(answer.digits, answer.base))))

    def _leaves(self, gold: Node, answer: Node) -> Outcome:
        if not (isinstance(gold, Leaf) and isinstance(answer, Leaf)):
            return different("answers of different kinds")
        if answer.value is None and is_prose(answer.latex) and not is_prose(gold.latex):
            return prose_for_value(gold, answer.latex)
        number_sets = [NUMBER_SET.fullmatch(leaf.latex) for leaf in (gold, answer)]
        if all(number_sets):
            is_same = text_key(gold.latex) == text_key(answer.latex)
            return equal("the same set") if is_same else different("different sets")
        if gold.unit is not None and answer.unit is not None and not gold.unit.agrees(answer.unit):
            amounts = amount_of(gold), amount_of(answer)
            same = amounts[0] is not None and amounts[0] == amounts[1]
            return equal("the same amount in another unit") if same else different("different units")
        answer = with_unit_letter(answer, gold)
        if gold.percent == answer.percent:
            outcome = self._numbers(gold, answer)
            if outcome.verdict is not Verdict.CORRECT:
                return self._angles(gold, answer) or self._quarters(gold, answer) or outcome
            if gold.unit is None and answer.unit is not None and not answer.unit.is_known:
                return unknown("words after the value that are no known unit")
            return outcome
        if any(leaf.unit is not None and leaf.unit != PERCENT for leaf in (gold, answer)):
            return different("a percentage against a value with a unit")
        if answer.unit == PERCENT:  # in words the percentage is no mere sign
            return self._numbers(gold, as_fraction(answer))
        same_digits = self._numbers(gold, answer)
        if same_digits.verdict is Verdict.CORRECT:
            return same_digits
        return self._numbers(as_fraction(gold), as_fraction(answer))

    def _quarters(self, gold: Leaf, answer: Leaf) -> Outcome | None:
        """Compares `7 quarters` with 7/4; the quarters may also be coins."""
        if (
            gold.unit is None
            and answer.unit is not None
            and answer.unit.words == ("quarter",)
            and answer.value is not None
        ):
            return self._numbers(gold, Leaf(f"\\frac{{{answer.latex}}}{{4}}", answer.value / 4))
        return None

    def _angles(self, gold: Leaf, answer: Leaf) -> Outcome | None:
        """Compares degrees with radians: 60 degrees is a third of pi. A number without pi is no angle in radians."""
        degrees, other = (gold, answer) if gold.unit == DEGREES else (answer, gold)
        if degrees.unit != DEGREES or other.unit is not None or not re.search(r"\\pi|\\arc", other.latex):
            return None
        radians = f"({degrees.latex})\\cdot \\frac{{\\pi}}{{180}}"
        return self.leaves.equal(radians, other.latex) if degrees is gold else self.leaves.equal(other.latex, radians)

    def _numbers(self, gold: Leaf, answer: Leaf) -> Outcome:
        if gold.value is not None and answer.value is not None:
            return equal("the same number") if gold.value == answer.value else different("different numbers")
        return self.leaves.equal(gold.latex, answer.latex)
