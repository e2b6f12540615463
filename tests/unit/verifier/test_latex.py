"""Numbers, words, structure and expressions: values worked out by hand, and invariances."""

from __future__ import annotations

from fractions import Fraction

import mpmath
import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mp

from oreal_megatron.types import Verdict
from oreal_megatron.verifier.equality.evaluate import CannotEvaluate, evaluate
from oreal_megatron.verifier.equality.expressions import SymbolicLeaves, exact_value
from oreal_megatron.verifier.input_limits import Refused, check_expression
from oreal_megatron.verifier.latex.latex_fallback import parse_full, prepare, read
from oreal_megatron.verifier.latex.latex_parser import Unreadable, read_common
from oreal_megatron.verifier.latex.nodes import Bracketed, Collection, Leaf, Matrix, Relation, Text
from oreal_megatron.verifier.latex.normalize import normalize, text_key
from oreal_megatron.verifier.latex.rational import parse_rational
from oreal_megatron.verifier.latex.structure import parse
from oreal_megatron.verifier.latex.units_and_words import parse_word_number, split_unit


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12", 12), ("-3", -3), ("+7", 7), ("007", 7), ("1,234", 1234), ("2,005,000", 2_005_000),
        (".5", Fraction(1, 2)), ("100.000", 100),
        ("\\frac{3}{-4}", Fraction(-3, 4)), ("7/4", Fraction(7, 4)), ("2\\frac{1}{3}", Fraction(7, 3)),
        ("-2\\frac{1}{3}", Fraction(-7, 3)),
        ("1 3/4", Fraction(7, 4)), ("1e2", 100), ("3.54*10^{-7}", Fraction(354, 10**9)),
        ("6.02\\times10^{23}", 602 * 10**21), ("10^6", 10**6),
        ("0.\\overline{12}", Fraction(4, 33)), ("0.1\\overline{6}", Fraction(1, 6)),
        ("1,23", None), ("1,2,00", None), ("1.2.3", None), ("1/0", None), ("2\\frac{5}{3}", None), ("--3", None),
        ("", None), ("x", None), ("5 6", None),
        ("1e99999", None), ("1" * 5_000, None),
    ],
)  # fmt: skip
def test_rational_by_hand(text: str, value: Fraction | int | None) -> None:
    assert parse_rational(text) == value


@given(top=st.integers(-(10**9), 10**9), bottom=st.integers(1, 10**9))
@settings(derandomize=True)
def test_every_spelling_of_a_fraction_has_its_value(top: int, bottom: int) -> None:
    value = Fraction(top, bottom)
    assert parse_rational(f"\\frac{{{top}}}{{{bottom}}}") == value
    assert parse_rational(f"{top}/{bottom}") == value
    assert parse_rational(normalize(f"$\\dfrac {{{3 * top}}}{{ {3 * bottom} }}$")) == value


@given(number=st.integers(0, 10**15), places=st.integers(1, 6))
def test_separators_and_decimals_do_not_change_the_value(number: int, places: int) -> None:
    assert parse_rational(f"{number:,}") == number
    assert parse_rational(f"{number}.{'0' * places}") == number
    assert parse_rational(normalize(f"{number:,}".replace(",", "{,}"))) == number
    assert parse_rational(normalize(f"{number:,}".replace(",", ",\\!"))) == number


@pytest.mark.parametrize(
    ("written", "normal"),
    [
        ("\\frac12", "\\frac{1}{2}"), ("\\dfrac 1{72}", "\\frac{1}{72}"), ("\\frac{x}2", "\\frac{x}{2}"),
        ("\\sqrt3", "\\sqrt{3}"), ("√2", "\\sqrt{2}"),
        ("x²", "x^{2}"), ("x≤2", "x\\le 2"), ("90°", "90\\degree"), ("90^{\\circ}", "90\\degree"),
        ("\\left( 1 \\right)", "( 1 )"), ("$5$.", "5"), ("５", "5"),
        ("\\mathrm{cm}", "\\text{cm}"), ("\\mathrm{e}", "e"), ("\\operatorname{lcm}(2,3)", "\\lcm (2,3)"),
        ("\\color{red}{5}", "5"), ("30{,}240", "30,240"),
        ("sqrt(2)", "\\sqrt{2}"), ("{6 \\choose 2}", "\\binom{6}{2}"), ("\\overline{AB}", "AB"),
        ("9^{\\text{th}}", "9"),
    ],
)  # fmt: skip
def test_normal_spelling(written: str, normal: str) -> None:
    assert normalize(written) == normal
    assert normalize(normal) == normal


def test_spaces_matter_between_digits_only() -> None:
    assert text_key("1 2") != text_key("12")
    assert text_key("x + 1") == text_key("x+1")


@given(st.text(max_size=200))
@settings(max_examples=200, derandomize=True)
def test_normalising_any_text_ends(text: str) -> None:
    assert isinstance(normalize(text), str)


@pytest.mark.parametrize(
    ("text", "value"),
    [("six", 6), ("twenty-one", 21), ("one hundred five", 105), ("two million", 2_000_000),
     ("one thousand six hundred twenty-five", 1625),
     ("million", None), ("six apples", None), ("", None)],
)  # fmt: skip
def test_numbers_in_words(text: str, value: int | None) -> None:
    assert parse_word_number(text) == value


@pytest.mark.parametrize(
    ("text", "number", "words", "percent"),
    [
        ("12\\text{ cm}", "12", ("cm",), False), ("5 \\text{ km per hour}", "5", ("km", "/", "h"), False),
        ("\\dollar 4.50", "4.50", ("usd",), False),
        ("36 \\text{ square centimeters}", "36", ("cm", "2"), False), ("28%", "28", None, True),
        ("3.5 \\text{ percent}", "3.5", ("percent",), True),
        ("2x", "2x", None, False), ("7 \\text{ or } 8", "7 \\text{ or } 8", None, False),
        ("45\\degree", "45", ("deg",), False),
    ],
)  # fmt: skip
def test_units(text: str, number: str, words: tuple[str, ...] | None, percent: bool) -> None:
    expression, unit, is_percent = split_unit(text)
    assert (expression, unit.words if unit else None, is_percent) == (number, words, percent)


@pytest.mark.parametrize(
    ("text", "kind", "num_parts"),
    [
        ("1,2,3", Collection, 3), ("\\{1,2\\}", Collection, 2), ("(1,2)", Bracketed, 2), ("[0,1)", Bracketed, 2),
        ("x=1, y=2", Collection, 2),
        ("1\\pm\\sqrt{5}, 3", Collection, 3), ("(1,2) \\text{ and } (2,1)", Collection, 2),
        ("\\emptyset", Collection, 0),
    ],
)  # fmt: skip
def test_structure(text: str, kind: type, num_parts: int) -> None:
    node = parse(normalize(text))
    assert isinstance(node, kind)
    assert len(node.parts) == num_parts


def test_structure_of_other_shapes() -> None:
    assert isinstance(parse("x<3"), Relation)
    assert isinstance(parse("\\text{red}"), Text)
    assert parse("1,234") == Leaf("1,234", Fraction(1234))
    matrix = parse(normalize("\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}"))
    assert isinstance(matrix, Matrix) and len(matrix.rows) == 2


SAME_READING = [
    "x^{2}+2x+1", "2\\pi r h", "\\frac{1}{2}x", "\\sin 2x", "2\\sin x\\cos x", "\\sin^{2} x", "\\tan^{-1} x",
    "\\log_{2} 8", "\\ln 3", "\\log 2", "e^{-2x}", "n!", "|x-1|",
    "\\lfloor \\frac{n}{2}\\rfloor", "\\binom{n}{2}", "\\sqrt[3]{x}", "10\\sqrt{5}/3-6", "a_{1}+a_2",
    "2\\frac{1}{3}+x", "(x+1)(x-2)^{2}", "-x^{2}", "3+4i", "\\theta^{2}", "x/2-1/4",
    "2^{n+1}", "x^{-1}", "\\frac{1}{1+\\frac{1}{x}}", "\\exp(x)", "n(n+1)", "\\cos(2t)", "[x+1]y", "1.5x",
    "\\sqrt{x^{2}+1}", "ab(c-d)", "5\\cdot 3\\times x", "\\arcsin(x)",
]  # fmt: skip


@pytest.mark.parametrize("latex", SAME_READING)
def test_both_readers_read_the_same(latex: str) -> None:
    """The fast reader agrees with the full parser wherever both read."""
    ours, theirs = read_common(latex), parse_full(prepare(latex))
    outcome = SymbolicLeaves().equal_trees(theirs, ours)
    assert outcome.verdict is Verdict.CORRECT, (ours, theirs)


@pytest.mark.parametrize(
    "latex",
    [
        "25 3",
        "2^10",
        "f(x)",
        "\\sin(x)^2",
        "\\sin x/2",
        "x^{2}^{3}",
        "5!!",
        "\\int_0^1 x dx",
        "1=1",
        "",
        "2\\frac{5}{3}",
        "x_{}",
        "\\frac{1}{2}{3}",
        "é",
    ],
)
def test_the_fast_reader_is_timid(latex: str) -> None:
    with pytest.raises(Unreadable):
        read_common(latex)


@pytest.mark.parametrize("latex", ["x+", "\\frac{1}", "", "((1)", "1=1", "\\foo{3}", "x,y", "204_{}"])
def test_unreadable(latex: str) -> None:
    with pytest.raises(Unreadable):
        read(latex)


@pytest.mark.parametrize(
    "latex",
    [
        "9^{9^{9}}",
        "2^{100000000}",
        "(0.1)^{100000000}",
        "9^9^9^9",
        "10000000!",
        "\\binom{1000000}{500000}",
        "(" * 41 + "1" + ")" * 41,
        "1" * 4_001,
        "x" * 8_193,
    ],
)
def test_caps(latex: str) -> None:
    with pytest.raises(Refused):
        check_expression(latex)


def test_exact_values() -> None:
    assert exact_value(read("\\frac{1}{2}+\\frac{1}{72}-(\\frac{2}{3})^{2}")) == Fraction(1, 2) + Fraction(
        1, 72
    ) - Fraction(4, 9)
    assert exact_value(read("2^{1000}+1")) == 2**1000 + 1
    assert exact_value(read("\\sqrt{4}")) is None
    assert exact_value(read("0^{-1}")) is None


@pytest.mark.parametrize(
    ("latex", "at", "value"),
    [
        ("x^{2}+1", {"x": 3}, 10), ("\\sqrt[3]{-8}", {}, -2), ("(-8)^{2/3}", {}, 4), ("\\binom{10}{3}", {}, 120),
        ("5!", {}, 120), ("|x|", {"x": -2}, 2),
        ("\\lfloor 3.7\\rfloor", {}, 3), ("\\lceil 3.2\\rceil", {}, 4), ("\\log_{2} 8", {}, 3),
        ("\\sin 30\\degree", {}, 0.5), ("\\sum_{k=1}^{10} k", {}, 55),
        ("\\prod_{k=1}^{4} k", {}, 24),
    ],
)  # fmt: skip
def test_evaluation_by_hand(latex: str, at: dict[str, int], value: float) -> None:
    with mp.workdps(50):
        assert abs(evaluate(read(latex), {name: mpmath.mpf(number) for name, number in at.items()}) - value) < 1e-45


@pytest.mark.parametrize("latex", ["1/0", "\\ln 0", "99999!", "10^{7000}!", "x"])
def test_no_value(latex: str) -> None:
    with pytest.raises((CannotEvaluate, Refused)):
        evaluate(read(latex), {})


@given(a=st.integers(-9, 9), b=st.integers(-9, 9), c=st.integers(-9, 9))
@settings(max_examples=60, derandomize=True)
def test_expanding_keeps_and_a_changed_coefficient_breaks_equality(a: int, b: int, c: int) -> None:
    x = sympy.Symbol("x")
    expanded = sympy.latex(sympy.expand((x - a) * (x - b) * (x - c)))
    changed = sympy.latex(sympy.expand((x - a) * (x - b) * (x - c) + x))
    product = f"(x-({a}))(x-({b}))(x-({c}))"
    leaves = SymbolicLeaves()
    assert leaves.equal(product, normalize(expanded)).verdict is Verdict.CORRECT
    assert leaves.equal(product, normalize(changed)).verdict is Verdict.INCORRECT
