"""Kinds of answers that users of graders report as misjudged, with examples of this project's own."""

from __future__ import annotations

import pytest

from oreal_megatron.types import GradeRequest, Verdict
from oreal_megatron.verifier import StagedVerifier
from oreal_megatron.verifier.extract import gold_value

from .labelled import pair

YES, NO, UNSURE = Verdict.CORRECT, Verdict.INCORRECT, Verdict.UNDECIDED

LETTERS = [
    ("\\text{DACB}", "\\text{ABCD}", NO), ("\\text{DACB}", "DACB", YES), ("\\text{DACB}", "D, A, C, B", YES),
    ("FED", "DEF", NO), ("C, A, D", "A, C, D", NO), ("\\text{A, C, D}", "D, A and C", YES), ("A, C", "A, D", NO),
    ("\\text{LMN}", "NML", NO), ("TTH", "THT", NO), ("xyz", "zyx", YES), ("\\text{RQ}", "\\text{QR}", NO),
    ("B", "b", YES), ("B", "(b)", YES), ("B", "c", NO), ("RSTU", "\\overline{RSTU}", YES), ("MN", "NM", UNSURE),
]  # fmt: skip
CHOICES_WITH_VALUES = [
    ("\\text{(C)}\\ \\frac58", "C", YES), ("\\text{(C)}\\ \\frac58", "\\frac{5}{8}", YES),
    ("\\text{(C)}\\ \\frac58", "B", NO), ("\\text{(C)}\\ \\frac58", "\\textbf{(C)} 0.625", YES),
    ("\\text{(C)}\\ \\frac58", "\\frac{3}{8}", NO),
]  # fmt: skip
TAILS = [
    ("11", "11 \\text{ fifths}", NO), ("\\frac{11}{5}", "11\\text{ fifths}", YES), ("11", "11\\ \\mathrm{sixths}", NO),
    ("11", "11\\text{ factorial}", NO), ("11", "11\\text{ choose }4", NO), ("330", "11\\text{ choose }4", YES),
    ("11", "11\\text{ over 3}", NO), ("\\frac{11}{3}", "11 \\text{ divided by 3}", YES), ("11", "11\\text{ pi}", NO),
    ("11", "11\\text{ sqrt 5}", NO), ("11", "11 \\text{ remainder 4}", NO), ("11", "11\\text{ +2}", NO),
    ("11", "11\\text{-3}", NO), ("11", "11\\text{ y}", NO), ("11", "11\\mathrm{t}", NO), ("11t", "11\\mathrm{t}", YES),
    ("11", "11\\text{ (false)}", NO), ("11", "11\\ \\mathrm{untrue}", NO), ("11", "11 \\text{ minus two}", NO),
    ("121", "11\\text{ squared}", YES), ("11", "11\\text{!}", NO), ("11", "11\\text{ K}", UNSURE),
    ("11", "11\\text{ blorks}", UNSURE), ("11", "11\\text{ percent}", NO), ("0.11", "11\\text{ percent}", YES),
    ("11\\%", "11\\text{ percent}", YES), ("11", "11\\%", YES), ("11", "11\\text{ modulo 4}", NO),
    ("11", "11\\text{ pencils}", YES), ("11", "11\\text{ cm}", YES), ("11", "11 \\text{ square inches}", YES),
    ("11\\text{ blorks}", "11", YES), ("300\\text{ K}", "300", YES), ("11", "11\\text{ different ways}", YES),
    ("\\sqrt{5}", "\\sqrt{5}\\text{ over 2}", NO), ("11", "11\\ \\text{m/s}", YES), ("11", "11\\text{ dollars}", YES),
]  # fmt: skip
NOTATION = [
    ("\\begin{pmatrix}5\\\\6\\end{pmatrix}", "\\begin{bmatrix}5\\\\[3mm]6\\end{bmatrix}", YES),
    ("\\begin{pmatrix}5\\\\[1ex]6\\end{pmatrix}", "(5,6)", YES),
    ("\\begin{pmatrix}5&6\\\\7&8\\end{pmatrix}", "\\begin{pmatrix}5&6\\cr 7&8\\cr\\end{pmatrix}", YES),
    ("\\begin{pmatrix}5\\\\6\\end{pmatrix}", "\\begin{pmatrix}5\\\\*7\\end{pmatrix}", NO),
    ("\\{4,-9\\}", "x_1=-9, x_2=4", YES), ("4, -9", "t_{1}=-9,\\ t_{2}=4", YES), ("\\{4,-9\\}", "x_1=-9, x_2=5", NO),
    ("x=4 \\text{ or } x=-9", "x_1=-9\\text{ and }x_2=4", YES), ("(4,-9)", "x_1=-9, x_2=4", NO),
    ("10:30", "10{:}30", YES), ("5:7", "5\\mathbin{:}7", YES), ("5:7", "5\\colon 7", YES), ("5:7", "7{:}5", NO),
    ("6:20 \\text{ p.m.}", "\\text{6:20 PM}", YES), ("6:20 \\text{ p.m.}", "\\text{6:20 a.m.}", NO),
    ("18:20", "\\text{6:20 PM}", YES), ("6:20", "18:20", NO), ("6:20", "6:20\\text{ PM}", YES),
    ("p+q=40+1=41", "41", YES), ("41", "p+q=40+1=41", YES), ("41", "p+q=40+2=41", NO), ("41", "p+q=41", UNSURE),
    ("\\frac{n(n-1)}{2}", "C_n^2", YES), ("\\frac{n(n-1)}{2}", "C_{n}^{3}", NO), ("84", "C(9,3)", YES),
    ("84", "C(9,4)", NO), ("(9,3)", "C(9,3)", YES), ("x^2-1", "g\\colon x\\mapsto x^2-1", YES),
    ("x^2-1", "x\\mapsto x^2+1", NO),
    ("\\begin{pmatrix}2\\\\-5\\\\1\\end{pmatrix}", "2\\mathbf{i}-5\\mathbf{j}+\\mathbf{k}", YES),
    ("\\begin{pmatrix}2\\\\-5\\\\1\\end{pmatrix}", "2\\hat{i}+5\\hat{j}+\\hat{k}", NO),
    ("(3,4)", "3\\vec{i}+4\\vec{j}", YES),
    ("n\\equiv 2\\pmod 5", "n=5k+2,\\ k\\in\\mathbb{Z}", YES), ("n\\equiv 2\\pmod 5", "n=5k+3,\\ k\\in\\mathbb{Z}", NO),
    ("n\\equiv 2\\pmod 5", "n=10k+2,\\ k\\in\\mathbb{Z}", NO), ("8y", "8\\mathrm{y}", YES),
    ("1\\text{ hour }45\\text{ minutes}", "1.75\\text{ hours}", YES),
    ("1\\text{ hour }45\\text{ minutes}", "1.5\\text{ hours}", NO),
]  # fmt: skip
GOLDS = [
    ("The answer is 13.", "13"), ("Answer: 13", "13"), ("FINAL ANSWER: 13", "13"), ("So the final answer is 13.", "13"),
    ("13 (thirteen)", "13"), ("['13']", "13"), ('["13"]', "13"), ("#### 13", "13"), ("We add. $\\boxed{13}$", "13"),
    ("She has 6 + 7 = <<6+7=13>>13 pens.\nThey are new.\n#### 13", "13"), ("\\$13\\$", "13"), ("Answer. 13", "13"),
    ("13", "13"), ("\\frac{1}{3}", "\\frac{1}{3}"), ("[1,2]", "[1,2]"), ("13 (twelve)", "13 (twelve)"),
]  # fmt: skip
AROUND_THE_BOX = [
    ("9", "It is $-\\boxed{9}$.", NO), ("-9", "It is $-\\boxed{9}$.", NO), ("9", "It is -$\\boxed{9}$.", NO),
    ("9", "So $y < \\boxed{9}$.", NO), ("9", "So $3\\times\\boxed{9}$.", NO), ("9", "So $3\\boxed{9}$.", NO),
    ("9", "So $\\boxed{9}^2$.", NO), ("9", "So $\\boxed{9}\\cdot 2$.", NO), ("9", "So $\\boxed{9}x$.", NO),
    ("9", "So $\\boxed{9}+1$.", NO), ("9", "It is never $\\boxed{9}$.", NO), ("9", "It isn't \\boxed{9}.", NO),
    ("9", "It is not equal to $\\boxed{9}$.", NO), ("9", "It is $\\boxed{9}$ or 10.", NO),
    ("9", "It is $\\boxed{9}$, $10$ or $11$.", NO), ("9", "It is $\\boxed{9}$. Correction: 10.", NO),
    ("9", "It is $\\boxed{9}$. Actually, I meant 10.", NO), ("9", "It is $\\boxed{9}$, but this is wrong.", NO),
    ("9", "It is \\boxed{9}. Wait, it should be 10.", NO),
    ("9", "It is $\\boxed{9}\\%$.", NO),
    ("9\\%", "It is $\\boxed{9}\\%$.", YES),
    ("9", "It is $\\boxed{9}$. This should be 9.", YES), ("9", "So $y=\\boxed{9}$.", YES), ("9", "- \\boxed{9}", YES),
    ("9", "**Answer** - $\\boxed{9}$", YES),
    ("9", "The answer is $\\boxed{9}$!", YES),
    ("9", "Hence $\\boxed{9}\\text{ cm}$.", YES),
    ("30^\\circ", "It is $\\boxed{30}^\\circ$.", YES), ("9", "\\begin{align}y&=\\boxed{9}\\end{align}", YES),
    ("9", "We get $4+5=\\boxed{9}$, as 9 is the sum of 4 and 5.", YES),
    ("9", "It is $\\boxed{9}$. I checked it with 3 methods.", YES),
    ("9", "$\\boxed{9}$. If it were 10, the sum should be 20.", YES), ("9", "It is $\\boxed{9}$ thousand.", NO),
    ("9", "It is $\\boxed{9}$ minus $y$.", NO), ("9", "It is $\\boxed{9}\\,y$.", NO),
    ("9", "It happens $\\boxed{9}$ times.", YES),
    ("9", "$$\\boxed{9}$$", YES), ("9", "\\[\\therefore \\boxed{9}\\]", YES), ("9", "$\\Rightarrow\\boxed{9}$", YES),
    ("0.5", "It is $\\boxed{\\frac12}$ or 0.5.", YES),
    ("9", "The rate is at least 3, so the number is $\\boxed{9}$.", YES),
    ("9", "**\\boxed{9}**", YES), ("9", "*$x$ is* **$\\boxed{9}$**", YES), ("9", "<answer>\\boxed{9}</answer>", YES),
    ("9", "So \\boxed{9}\n\n- I checked it.\n- It holds.", YES), ("9", "It is \\boxed{9} - the sum of both.", YES),
    ("9", "It is \\boxed{9}\n1. First check.", YES),
    ("9", "1. $\\boxed{9}$", YES),
    ("9", "For $k>2$ it is $\\boxed{9}$ (see above).", YES),
]  # fmt: skip
STEPS_AND_CODE = [
    ("11", "(a) $\\boxed{5}$ (b) $\\boxed{6}$\nTherefore the sum is $\\boxed{11}$.", YES),
    ("11", "Step 1: \\boxed{5}.\nStep 2: \\boxed{6}.\nThe answer is \\boxed{11}.", YES),
    ("11", "It is \\boxed{10}. No, the answer is \\boxed{11}.", NO),
    ("5", "(a) $\\boxed{5}$ (b) $\\boxed{6}$. So the sum is $\\boxed{11}$.", NO),
    ("11", "Part 1: \\boxed{10}. Wait, that is wrong. The answer is \\boxed{11}.", NO),
    ("11", "The answer is `\\boxed{11}`.", YES), ("11", "Final answer:\n```latex\n\\boxed{11}\n```", YES),
    ("11", "Nobody wrote `\\boxed{11}` here.", NO),
    ('11', 'a 5" pipe "so\nThe answer is $\\boxed{11}$, "that is all".', YES),
    ("11", "</think> \\boxed{10} </think> \\boxed{11}", NO), ("11", "</think> \\boxed{11} </think> \\boxed{11}", YES),
    ("11", "**Final Answer** \\boxed{10}, let me see. </think> So **Final Answer** \\boxed{11}", YES),
]  # fmt: skip


@pytest.mark.parametrize(("gold", "answer", "verdict"), [*LETTERS, *CHOICES_WITH_VALUES, *TAILS, *NOTATION])
def test_pairs_of_reported_kinds(verifier: StagedVerifier, gold: str, answer: str, verdict: Verdict) -> None:
    grade = verifier.grade_answers([pair(gold, answer)])[0]
    assert grade.verdict is verdict, grade


@pytest.mark.parametrize(("gold", "response", "verdict"), [*AROUND_THE_BOX, *STEPS_AND_CODE])
def test_text_around_the_box(verifier: StagedVerifier, gold: str, response: str, verdict: Verdict) -> None:
    grade = verifier.grade([GradeRequest(question="", gold_answer=gold, response=response, stopped=True)])[0]
    assert grade.verdict is verdict, grade


@pytest.mark.parametrize(("gold", "value"), GOLDS)
def test_gold_value_of_data_sets(gold: str, value: str) -> None:
    assert gold_value(gold) == value


@pytest.mark.parametrize("gold", [gold for gold, value in GOLDS if value == "13"])
def test_golds_of_data_sets_decide(verifier: StagedVerifier, gold: str) -> None:
    grades = verifier.grade_answers([pair(gold, "13"), pair(gold, "14")])
    assert [grade.verdict for grade in grades] == [YES, NO]


def test_many_radicals_in_another_order(verifier: StagedVerifier) -> None:
    roots = [f"\\sqrt{{{number}}}" for number in range(2, 62)]
    gold = "\\{" + ", ".join(roots) + "\\}"
    right, wrong = ("\\{" + ", ".join(last + roots[30:] + roots[1:30]) + "\\}" for last in (["2^{1/2}"], ["3^{1/2}"]))
    grades = verifier.grade_answers([pair(gold, right), pair(gold, wrong)])
    assert [grade.verdict for grade in grades] == [YES, NO]
