"""Labelled cases and how they are scored."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from oreal_megatron.types import Grade, GradeRequest, Verdict
from oreal_megatron.verifier import StagedVerifier
from oreal_megatron.verifier.grade_file import grade_rows, read_rows

OWN_CASES = Path(__file__).parent / "cases"
SHARED_DIR = Path(os.environ.get("OREAL_SHARED_DIR", Path(__file__).resolve().parents[4] / "shared"))
STOP_TOKEN = "<|im_end|>"


def case_file(name: str) -> Path:
    """A file of labelled cases; the test is skipped where it may not be kept with the project and is not at hand."""
    own = OWN_CASES / f"{name}.jsonl"
    if own.exists():
        return own
    shared = SHARED_DIR / "verifier_cases" / f"{name}.jsonl"
    if not shared.exists():
        pytest.skip(
            f"{shared} is not there: {name}.jsonl is read in place; set OREAL_SHARED_DIR to its parent directory"
        )
    return shared


@dataclass(frozen=True)
class Score:
    """How verdicts compare with labels. UNDECIDED is an error, and never a false positive."""

    num: int
    wrong: list[str]
    num_false_positives: int

    @property
    def accuracy(self) -> float:
        return 1 - len(self.wrong) / self.num


def answer_of(case: dict[str, Any]) -> str:
    """The text to grade; whole responses have their own key in some files."""
    return str(case.get("answer", case.get("response")))


def score(cases: list[dict[str, Any]], grades: list[Grade]) -> Score:
    wrong, false_positives = [], 0
    for case, grade in zip(cases, grades, strict=True):
        if grade.verdict is not (Verdict.CORRECT if case["label"] else Verdict.INCORRECT):
            wrong.append(
                f"{case['id']}: {case['gold']!r} against {answer_of(case)[-80:]!r}: {grade.verdict}, {grade.reason}"
            )
            false_positives += grade.verdict is Verdict.CORRECT
    return Score(len(cases), wrong, false_positives)


def grade_file(verifier: StagedVerifier, name: str) -> tuple[list[dict[str, Any]], list[Grade]]:
    """The cases of a file with their grades."""
    path = case_file(name)
    with path.open(encoding="utf-8") as file:
        cases = [json.loads(line) for line in file]
    return cases, grade_rows(verifier, list(read_rows(path, STOP_TOKEN)))


def pair(gold: str, answer: str) -> GradeRequest:
    """A request whose response is the bare answer."""
    return GradeRequest(question="", gold_answer=gold, response=answer, stopped=True)
