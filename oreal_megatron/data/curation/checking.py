"""Check of a prompt file: lines that a run cannot use, or from which it would learn what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from oreal_megatron.data.curation.report import Report
from oreal_megatron.data.curation.text import question_key
from oreal_megatron.data.golds import gold_fault
from oreal_megatron.data.records import read_records, text_at
from oreal_megatron.files import json_line, write_parts_atomically
from oreal_megatron.types import GradeRequest, Verdict
from oreal_megatron.verifier import StagedVerifier
from oreal_megatron.verifier.extract import gold_value

UNREADABLE, OVERLONG = "gold answer that the verifier cannot read", "prompt longer than prompt.max_prompt_tokens"
SOUND = "without a fault of its own"
REPEATED, CONFLICTING = "question of an earlier line", "question of an earlier line with another gold answer"
_BATCH = 512
_WRONG_NUMBER = "-987654321"
"""Answer that no problem has. The verdict on it is UNDECIDED only where the gold answer cannot be read."""

Record = tuple[str, dict[str, Any]]
"""File and line, and the record."""


def read_questions(path: Path, advance: Callable[[], None]) -> Iterator[Record]:
    """Yields (file and line, record) of a file of prompts, with question and gold_answer as texts.

    advance: is called after each line.

    Raises:
        ValueError: a line is no such record, and the message has the command that makes it one; or there are none.
    """
    number = 0
    for number, record in read_records(path):
        where = f"{path}:{number}"
        texts = {
            key: "" if record.get(key, 0) is None else text_at(record, key, where, wanted=("question", "gold_answer"))
            for key in ("question", "gold_answer")
        }
        yield where, {**record, **texts}
        advance()
    if not number:
        raise ValueError(f"{path}: it has no records. Every line must be an object with question and gold_answer.")


def check(
    path: Path,
    verifier: StagedVerifier,
    *,
    output: Path | None,
    num_tokens: Callable[[str], int] | None,
    max_prompt_tokens: int,
    advance: Callable[[], None],
) -> Report:
    """Returns the faults of a file's lines, and writes the lines without faults of their own to `output`.

    Repeated questions are counted and stay: `dedupe` leaves them out.

    num_tokens: gives the length of the prompt of a question; None: lengths are not checked.
    """
    report = Report()
    lines = _sound_lines(path, verifier, num_tokens, max_prompt_tokens, report, advance)
    if output is not None:
        write_parts_atomically(output, lines)
    else:
        for _ in lines:
            pass
    return report


def _sound_lines(
    path: Path,
    verifier: StagedVerifier,
    num_tokens: Callable[[str], int] | None,
    max_prompt_tokens: int,
    report: Report,
    advance: Callable[[], None],
) -> Iterator[bytes]:
    golds: dict[bytes, tuple[str, str]] = {}
    """First line of each question, and its gold answer."""
    readable: dict[str, str | None] = {}
    """Fault of a gold answer, by its text; None: it has none."""
    records = read_questions(path, advance)
    while batch := list(islice(records, _BATCH)):
        _read_golds(batch, verifier, readable)
        for where, record in batch:
            question, gold = record["question"], record["gold_answer"].strip()
            fault, text = gold_fault(gold), gold
            if not question.strip():
                fault, text = "empty question", gold
            elif fault is None and (reason := readable[gold]) is not None:
                fault, text = UNREADABLE, f"{gold} ({reason})"
            elif fault is None and num_tokens is not None and (length := num_tokens(question)) > max_prompt_tokens:
                fault, text = OVERLONG, f"{length} tokens: {question}"
            if fault is not None:
                report.add(fault, where, text)
            else:
                report.counts[SOUND] += 1
                yield json_line(record)
            first = golds.setdefault(question_key(question), (where, gold))
            if first[0] != where:
                kind = REPEATED if _agree(first[1], gold, verifier) else CONFLICTING
                report.add(kind, where, f"{first[1]} | {gold}: {question}")


def _agree(gold: str, other: str, verifier: StagedVerifier) -> bool:
    """Whether two gold answers have the same value."""
    if gold_value(gold) == gold_value(other):
        return True
    request = GradeRequest(question="", gold_answer=gold, response=gold_value(other), stopped=True)
    return verifier.grade_answers([request])[0].verdict is Verdict.CORRECT


def _read_golds(batch: Sequence[Record], verifier: StagedVerifier, readable: dict[str, str | None]) -> None:
    """Adds the faults of a batch's gold answers: each must equal itself, and differ from a wrong number."""
    golds = [
        gold for gold in dict.fromkeys(record["gold_answer"].strip() for _, record in batch) if gold not in readable
    ]

    def requests(answers: Sequence[str]) -> list[GradeRequest]:
        return [
            GradeRequest(question="", gold_answer=gold, response=answer, stopped=True)
            for gold, answer in zip(golds, answers, strict=True)
        ]

    itself = verifier.grade(requests([f"$\\boxed{{{gold_value(gold)}}}$" for gold in golds]))
    other = verifier.grade_answers(requests([_WRONG_NUMBER] * len(golds)))
    for gold, same, different in zip(golds, itself, other, strict=True):
        if same.verdict is not Verdict.CORRECT:
            readable[gold] = f"in a box it is {same.verdict}: {same.reason}"
        else:
            readable[gold] = None if different.verdict is Verdict.INCORRECT else different.reason
