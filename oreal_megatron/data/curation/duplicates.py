"""Duplicates of a prompt file: equal questions, and questions with almost the same words and the same numbers."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from datasketch import MinHash, MinHashLSH

from oreal_megatron.data.curation.checking import question_key, read_questions
from oreal_megatron.data.curation.report import Report
from oreal_megatron.data.curation.text import numbers, tokens
from oreal_megatron.files import json_line, write_parts_atomically
from oreal_megatron.types import GradeRequest, Verdict
from oreal_megatron.verifier import StagedVerifier
from oreal_megatron.verifier.extract import gold_value

WRITTEN, EQUAL, NEAR = "written", "equal question", "near duplicate"
CONFLICTING = "question with several gold answers"
_PERMUTATIONS = 128
_WORDS = 3
"""Words of a shingle."""


def dedupe(
    path: Path, output: Path, verifier: StagedVerifier, *, threshold: float | None, advance: Callable[[], None]
) -> Report:
    """Writes the first line of each question. Questions with gold answers that differ in value are left out whole.

    The file is read twice. Memory grows with the number of different questions.

    threshold: Jaccard similarity from which two questions are near duplicates; None: equal questions only.
    advance: is called twice for each line.
    """
    conflicting = _conflicting(path, verifier, advance)
    report = Report()
    write_parts_atomically(output, _first_lines(path, conflicting, threshold, report, advance))
    return report


def _conflicting(path: Path, verifier: StagedVerifier, advance: Callable[[], None]) -> set[bytes]:
    """Returns the keys of questions whose gold answers the verifier does not call equal."""
    first: dict[bytes, str] = {}
    others: dict[tuple[bytes, str], str] = {}
    for _, record in read_questions(path, advance):
        key, gold = question_key(record["question"]), record["gold_answer"].strip()
        if first.setdefault(key, gold) != gold:
            others[key, gold] = first[key]
    requests = [
        GradeRequest(question="", gold_answer=gold, response=gold_value(other), stopped=True)
        for (_, other), gold in others.items()
    ]
    grades = verifier.grade_answers(requests)
    return {key for (key, _), grade in zip(others, grades, strict=True) if grade.verdict is not Verdict.CORRECT}


def _first_lines(
    path: Path, conflicting: set[bytes], threshold: float | None, report: Report, advance: Callable[[], None]
) -> Iterator[bytes]:
    seen: dict[bytes, str] = {}
    near = None if threshold is None else NearDuplicates(threshold)
    for where, record in read_questions(path, advance):
        question = record["question"]
        key = question_key(question)
        if key in conflicting:
            report.add(CONFLICTING, where, f"{record['gold_answer']}: {question}")
        elif key in seen:
            report.add(EQUAL, where, f"as {seen[key]}: {question}")
        elif near is not None and (other := near.add(question, where)) is not None:
            report.add(NEAR, where, f"as {other}: {question}")
        else:
            report.counts[WRITTEN] += 1
            yield json_line(record)
        seen.setdefault(key, where)


class NearDuplicates:
    """An index of questions that finds an earlier one with almost the same words."""

    def __init__(self, threshold: float):
        """Makes an empty index. threshold: Jaccard similarity of word triples, in (0, 1)."""
        self._threshold = threshold
        self._index = MinHashLSH(threshold=threshold, num_perm=_PERMUTATIONS)
        self._added: list[tuple[str, str]] = []
        """Question, and its file and line, by the key of the index."""

    def add(self, question: str, where: str) -> str | None:
        """Returns the place of an earlier near duplicate; if there is none, adds the question and returns None."""
        shingles = _shingles(question)
        sketch = MinHash(num_perm=_PERMUTATIONS, hashfunc=zlib.crc32)
        sketch.update_batch(list(shingles))
        for index in sorted(self._index.query(sketch)):
            other, other_where = self._added[index]
            if len(shingles & _shingles(other)) >= self._threshold * len(shingles | _shingles(other)):
                return other_where
        self._index.insert(len(self._added), sketch)
        self._added.append((question, where))
        return None


def _shingles(question: str) -> frozenset[bytes]:
    """Returns the word triples of a question, each with all of its numbers.

    A problem with other numbers, as templates make them, is another problem: it shares no shingle.
    """
    words = tokens(question)
    its_numbers = ",".join(sorted(numbers(words).elements()))
    starts = range(max(1, len(words) - _WORDS + 1))
    return frozenset(f"{its_numbers}|{' '.join(words[i : i + _WORDS])}".encode() for i in starts)
