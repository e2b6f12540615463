"""Answers that no rule may leave UNDECIDED, and answers that no rule may call INCORRECT without evidence."""

from __future__ import annotations

import pytest

from oreal_megatron.types import Verdict
from oreal_megatron.verifier import StagedVerifier, VerifierConfig
from oreal_megatron.verifier.extract import extract

from .labelled import pair
from .test_safety import BOMBS

YES, NO, UNSURE = Verdict.CORRECT, Verdict.INCORRECT, Verdict.UNDECIDED
LONG_SUM = "+".join(f"x^{{{power}}}" for power in range(400))

CASES = [
    ("12", "\\int_0^1 e^{-x^2}\\,dx", NO), ("12", "\\lim_{x\\to0}\\frac{\\sin x}{x}", NO), ("12", "\\log_{0} 3", NO),
    ("12", "9^{9^{9}}", NO), ("12", "200000!", NO), ("12", "(" * 50 + "12" + ")" * 50, NO),
    ("2", "\\sum_{n=0}^{\\infty}\\frac{1}{2^n}", NO), ("0", f"\\frac{{x^{{400}}-1}}{{x-1}}-({LONG_SUM})", YES),
    ("1", f"\\frac{{x^{{400}}-1}}{{x-1}}-({LONG_SUM})", NO), ("\\sqrt{2}", "9^{9^{9}}", UNSURE),
    ("12", "4 \\text{ quarters}", NO), ("12", "12\\text{ quarters}", UNSURE), ("3", "12\\text{ quarters}", YES),
    ("$t(0,4]$", "98765", NO), ("05\\!:\\!00", "7", NO), ("05\\!:\\!00", "5{:}00", YES), ("-37_8", "-37", YES),
    ("-37_8", "98765", NO), ("\\text{A, D, F, G, H}", "x^3-7", NO), ("\\text{A, D, F, G, H}", "A, D, F, G, H", YES),
    ("the number of ways in which this may be done is 12", "12", UNSURE),
    ("the number of ways in which this may be done is 12", "13", NO),
    ("the number of ways in which this may be done is twelve", "13", NO),
    ("the number of ways in which this may be done is twelve", "12", UNSURE),
    ("the number of ways in which this may be done is $2^7$", "128", UNSURE),
    ("the number of ways in which this may be done is twice 7", "14", UNSURE),
    ("one must look at all cases of the hypothesis", "12", UNSURE), ("There are 12 such numbers.", "12", UNSURE),
    ("x=12 \\text{ or } x=13", "12", NO), ("\\text{June }12", "12", NO), ("12\\text{ minutes}", "12\\text{ hours}", NO),
    ("\\text{red, green, blue}", "\\text{blue, red, green}", UNSURE), ("\\text{Ann and Tom}", "\\text{Tom, Ann}", YES),
    ("AB", "BA", NO), ("BD", "DB", YES), ("AD", "DA", YES), ("ABD", "BDA", NO), ("BD", "BE", NO),
]  # fmt: skip


@pytest.mark.parametrize(("gold", "answer", "verdict"), CASES)
def test_decision(verifier: StagedVerifier, gold: str, answer: str, verdict: Verdict) -> None:
    grade = verifier.grade_answers([pair(gold, answer)])[0]
    assert grade.verdict is verdict, grade


def test_no_hostile_answer_to_a_number_is_undecided(verifier: StagedVerifier) -> None:
    grades = verifier.grade_answers([pair("5", bomb) for bomb in BOMBS])
    undecided = [(bomb[:60], grade) for bomb, grade in zip(BOMBS, grades, strict=True) if grade.verdict is not NO]
    assert not undecided


def test_a_wrong_value_among_many_radicals_is_found_in_linear_time(verifier: StagedVerifier) -> None:
    """Each value against each other takes longer than the shared verifier's limit."""
    roots = [f"\\sqrt{{{number}}}+1" for number in range(2, 302)]
    grade = verifier.grade_answers([pair(", ".join(roots), ", ".join(["\\sqrt{7777}+1", *roots[:0:-1]]))])[0]
    assert grade.verdict is NO, grade


@pytest.mark.parametrize(
    "response",
    [
        "\\boxed{12}" + " " * 20_000 + "or" + " " * 20_000,
        "\\boxed{12}" + "\n " * 20_000,
        "\\boxed{12}" + " actually" * 5_000 + "$ " * 20_000,
        "$" + "~" * 20_000 + "\\boxed{12}" + "~" * 20_000 + "$",
        "$" + "\\mathbf{" * 5_000 + "\\boxed{12}" + "}" * 5_000,
        "~~a" * 10_000 + "\\boxed{12}",
        "<s>" * 10_000 + "\\boxed{12}",
        "a " * 20_000 + "= \\boxed{5} so a+b=\\boxed{12}",
        "1," * 20_000 + " or \\boxed{12}",
    ],
    ids=range(9),
)
def test_hostile_surroundings_end(response: str) -> None:
    """A pattern that backtracks over these would run for hours; the test's time limit ends it."""
    extract(response, VerifierConfig().thinking_end_marks)
