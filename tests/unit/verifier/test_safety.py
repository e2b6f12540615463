"""Hostile answers: no crash, no code run, no answer over time, no process left."""

from __future__ import annotations

import random
import string
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from oreal_megatron.types import GradeRequest, Verdict
from oreal_megatron.verifier import StagedVerifier, VerifierConfig, build_verifier
from oreal_megatron.verifier.equality.leaves import NeedsSympy, RationalLeaves
from oreal_megatron.verifier.extract import extract
from oreal_megatron.verifier.rules import compare_final

from .labelled import pair
from .test_pool import is_alive, wait_until

CODE = [
    "__import__('os').mkdir('{path}')",
    "[__import__('os').mkdir('{path}')]",
    "\\pi+__import__('os').mkdir('{path}')",
    "eval(\"__import__('os').mkdir('{path}')\")",
    "x.__class__.__base__.__subclasses__()",
    "\\text{{__import__('os').mkdir('{path}')}}",
    "\\frac{{__import__('os').mkdir('{path}')}}{{1}}",
    "open('{path}','w').write('1')",
    "exec(open('{path}','w').write('1'))",
    "(lambda:open('{path}','w'))()",
    "\\write18{{mkdir {path}}}",
    "\\input{{{path}}}",
]
BOMBS = [
    "9^{9^{9^{9}}}", "9^9^9^9", "2^{2^{2^{2^{2^2}}}}", "(((10!)!)!)!", "10000000!", "99999!!",
    "\\binom{10^9}{5\\cdot10^8}",
    "\\binom{999999}{499999}", "((9^{19999})^{19999})^{19999}", "10^{10^{10}}", "(1+10^{-9})^{10^{9}}", "x^{99999999}",
    "0.1^{19999}",
    "\\sqrt{" * 39 + "2" + "}" * 39, "\\sqrt{" * 5_000, "(" * 4_000 + "1" + ")" * 4_000, "{" * 8_000, "\\frac{" * 1_300,
    "\\frac{1}{" * 38 + "2" + "}" * 38, "\\left(" * 1_000, "+".join(f"\\sqrt{{{n}}}" for n in range(2, 300)),
    "+".join(["x^{19}"] * 400),
    "*".join(["(x+y+z)^{99}"] * 100), "1" * 8_000, "0." + "3" * 8_000, "1/" * 3_000 + "1", "1," * 4_000,
    "\\{" + "1," * 3_000 + "2\\}",
    ",".join(f"\\sqrt{{{n}}}" for n in range(2, 400)), "\\pm" * 500 + "1", "=".join(["x"] * 500),
    "<".join(["x"] * 500), "\\cup".join(["(0,1)"] * 500),
    "\\begin{pmatrix}" + "&".join("1" * 500) + "\\end{pmatrix}", "\\begin{pmatrix}1&1\\\\1&0\\end{pmatrix}^{19999}",
    "\\int_0^1 x^{x^{x}} dx",
    "\\int\\int\\int\\int x dx dx dx dx", "\\sum_{n=1}^{10^9} \\frac{1}{n}", "\\prod_{n=1}^{99999999} n",
    "\\sum_{a=1}^{2000}\\sum_{b=1}^{2000} ab",
    "\\lim_{x\\to 0} \\frac{\\sin(x^{x})}{x}", "\\frac{d}{dx}" * 50 + "x^{x^{x}}",
    "\\gcd(" + "9" * 3_000 + "," + "7" * 3_000 + ")",
    "\\sin(" * 30 + "x" + ")" * 30, "|" * 3_000, "\\text{" * 2_000, "\\text{a}" * 1_000, "x_{" * 2_000, "x_" * 3_000,
    "^" * 8_000, "\\" * 8_001,
    "\x00" * 4_000, "\ud800\udfff" * 2_000, "５" * 4_000, "٣" * 100, "𝟗" * 2_000, "½" * 2_000, "²" * 4_000,
    "\\boxed{" * 1_000, "%" * 8_000,
    "-" * 8_000, "!" * 8_000, "5" + "!" * 3_000, "'" * 8_000, "a'" * 2_000, "[[" * 2_000, "1e999999999",
    "1e-999999999", "1e4000", "99999999_{36}", "z_{99}",
    "0.\\overline{" + "9" * 190 + "}", "\\overline{" * 1_000, "2\\frac" * 1_000, "\\sqrt[99999]{2}",
    "\\sqrt[3]{-8}^{19999}", "\\log_{0} 5", "\\log 0", "\\tan\\frac{\\pi}{2}",
    "\\frac{1}{\\sin\\pi}", "0^{-1}", "0^0", "\\infty-\\infty", "\\frac{\\infty}{\\infty}", "1:" * 2_000,
    "a and " * 1_300, "\\land".join("p" * 1_000),
]  # fmt: skip


@pytest.mark.parametrize("template", CODE)
def test_code_is_never_run(verifier: StagedVerifier, tmp_path: Path, template: str) -> None:
    path = tmp_path / "PWNED"
    answer = template.format(path=path)
    for gold in ("5", "\\pi", "\\begin{pmatrix}1\\\\2\\end{pmatrix}", "x^2"):
        assert verifier.grade_answers([pair(gold, answer)])[0].verdict is not Verdict.CORRECT
    assert not path.exists()


def test_bombs_cost_at_most_the_limit(tmp_path: Path) -> None:
    config = VerifierConfig(num_workers=1, timeout_seconds=1.0, memory_limit_mb=512)
    with build_verifier(config) as verifier:
        verifier.grade_answers([pair("\\sqrt{2}", "2^{1/2}")])
        processes = verifier.processes()
        grades = verifier.grade_answers([pair(gold, bomb) for bomb in BOMBS for gold in ("5", "x^{2}+1")])
        assert verifier.grade_answers([pair("\\sqrt{3}", "3^{1/2}")])[0].verdict is Verdict.CORRECT
        processes += verifier.processes()
    slow = [
        (bomb[:40], grade)
        for bomb, grade in zip([b for b in BOMBS for _ in "ab"], grades, strict=True)
        if grade.seconds > 1.5
    ]
    assert not slow
    assert not [grade for grade in grades if grade.verdict is Verdict.CORRECT]
    assert wait_until(lambda: not any(map(is_alive, processes)))


_PIECES = [
    "\\frac{", "\\sqrt{", "\\sqrt[3]{", "}", "{", "(", ")", "[", "]", "\\{", "\\}", "|", "^", "^{", "_", "_{", "+",
    "-", "*", "/", "!", "=", "<", "\\le", "\\pm",
    "\\cup", ",", ";", ":", "%", "\\%", "$", "\\$", "\\pi", "\\infty", "e", "i", "x", "y", "n", "AB", "1", "2", "10",
    "0", "3.5", "1,000", "999999", "\\sin", "\\log",
    "\\ln", "\\binom{5}{2}", "\\text{", "\\text{ or }", "\\text{cm}", "\\circ", "^\\circ", "\\boxed{",
    "\\begin{pmatrix}", "\\end{pmatrix}", "&", "\\\\", "\\in", "\\mathbb{R}",
    "\\mathbb{Z}", "\\sum_{k=1}^{n}", "\\int_0^1", "dx", "\\left(", "\\right)", "\\cdot", "\\overline{", "\\equiv",
    "\\pmod", "°", "²", "½", "√", "\x00", "\ud800", "é", "数", " ", "\n",
    "and", "or", "not", "no solution", "'", '"', "`", "\\", "#", "~", "__import__", "eval(", "\\angle", "\\vec{",
    "\\lfloor", "\\rfloor", "\\to", "\\lor", "f(x)", "\\max",
]  # fmt: skip
_GOLDS = (
    "5",
    "\\frac{1}{2}",
    "x^2+1",
    "(1,2)",
    "\\{1,2\\}",
    "[0,1)",
    "y=2x+1",
    "\\text{yes}",
    "B",
    "12\\text{ cm}",
    "50\\%",
    "101_2",
    "x>3",
    "\\begin{pmatrix}1\\\\2\\end{pmatrix}",
)


def random_answer(source: random.Random) -> str:
    """Tokens of answers in any order, sometimes a mutated gold answer, sometimes plain noise."""
    kind = source.random()
    if kind < 0.6:
        return "".join(source.choice(_PIECES) for _ in range(source.randint(1, 14)))
    if kind < 0.85:
        text = list(source.choice(_GOLDS))
        for _ in range(source.randint(1, 4)):
            text.insert(source.randint(0, len(text)), source.choice(_PIECES))
        return "".join(text)
    return "".join(source.choice(string.printable) for _ in range(source.randint(0, 60)))


def fuzz(num_inputs: int, seed: int, limit: float) -> None:
    """Grade random answers; every one must have a grade in time, and no process may be left."""
    source = random.Random(seed)
    with build_verifier(VerifierConfig(num_workers=1, timeout_seconds=limit, memory_limit_mb=512)) as verifier:
        verifier.grade_answers([pair("\\sqrt{2}", "2^{1/2}")])
        processes: set[int] = set()
        for start in range(0, num_inputs, 500):
            answers = [random_answer(source) for _ in range(min(500, num_inputs - start))]
            golds = [source.choice(_GOLDS) for _ in answers]
            grades = verifier.grade_answers([pair(g, a) for g, a in zip(golds, answers, strict=True)])
            late = [pair(g, a) for g, a, x in zip(golds, answers, grades, strict=True) if x.seconds > limit + 0.5]
            again = verifier.grade_answers(late)  # a busy machine may have stalled: alone it must be in time
            assert not [
                (request, grade) for request, grade in zip(late, again, strict=True) if grade.seconds > limit + 0.5
            ]
            failed = [
                (g, a, x) for g, a, x in zip(golds, answers, grades, strict=True) if "comparison failed" in x.reason
            ]
            assert not failed, failed[:3]
            processes.update(verifier.processes())
        metrics = verifier.drain_metrics()
        assert metrics["verifier/num_graded"] >= num_inputs + 1
    assert wait_until(lambda: not any(map(is_alive, processes)))


def test_fuzz_reduced() -> None:
    fuzz(2_500, seed=6, limit=2.0)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_fuzz() -> None:
    fuzz(100_000, seed=2025, limit=2.0)


@settings(max_examples=300, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(answer=st.text(max_size=300), gold=st.sampled_from(_GOLDS))
def test_any_text_has_an_outcome_without_sympy(answer: str, gold: str) -> None:
    """In this process only the fast path may run, and it never raises anything but its request for help."""
    started = time.process_time()
    extract(answer, VerifierConfig().thinking_end_marks)
    try:
        outcome = compare_final(gold, (answer,), (), RationalLeaves())
    except NeedsSympy:
        return
    assert outcome.verdict in Verdict
    assert time.process_time() - started < 0.5


def test_a_megabyte_in_each_field(verifier: StagedVerifier) -> None:
    huge = "x+" * 500_000
    requests = [
        GradeRequest(question=huge, gold_answer="5", response="\\boxed{5}", stopped=True),
        GradeRequest(question="", gold_answer="5", response=f"\\boxed{{{huge}}}", stopped=True),
        GradeRequest(question="", gold_answer=huge, response="\\boxed{5}", stopped=True),
        GradeRequest(question="", gold_answer="5", response=huge, stopped=True),
    ]
    grades = verifier.grade(requests)
    assert [grade.verdict for grade in grades] == [
        Verdict.CORRECT, Verdict.INCORRECT, Verdict.UNDECIDED, Verdict.INCORRECT,
    ]  # fmt: skip
    assert max(grade.seconds for grade in grades) < 1.0
