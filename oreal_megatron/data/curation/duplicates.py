"""Duplicates of a prompt file: equal questions, and questions with almost the same words and the same symbols."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from datasketch import MinHash, MinHashLSH

from oreal_megatron.data.curation.checking import read_questions
from oreal_megatron.data.curation.report import Report
from oreal_megatron.data.curation.text import question_key, tokens
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
    conflicting, shared = _first_reading(path, verifier, advance)
    report = Report()
    write_parts_atomically(output, _first_lines(path, conflicting, shared, threshold, report, advance))
    return report


def _first_reading(
    path: Path, verifier: StagedVerifier, advance: Callable[[], None]
) -> tuple[set[bytes], Counter[bytes]]:
    """Returns the keys of questions whose gold answers the verifier does not call equal, and the signatures' counts."""
    first: dict[bytes, str] = {}
    others: dict[tuple[bytes, str], str] = {}
    signatures: Counter[bytes] = Counter()
    for _, record in read_questions(path, advance):
        key, gold = question_key(record["question"]), record["gold_answer"].strip()
        if key not in first:
            first[key] = gold
            signatures[_signature(record)] += 1
        elif first[key] != gold:
            others[key, gold] = first[key]
    requests = [
        GradeRequest(question="", gold_answer=gold, response=gold_value(other), stopped=True)
        for (_, gold), other in others.items()
    ]
    grades = verifier.grade_answers(requests)
    conflicting = {key for (key, _), grade in zip(others, grades, strict=True) if grade.verdict is not Verdict.CORRECT}
    return conflicting, signatures


def _first_lines(
    path: Path,
    conflicting: set[bytes],
    signatures: Counter[bytes],
    threshold: float | None,
    report: Report,
    advance: Callable[[], None],
) -> Iterator[bytes]:
    seen: dict[bytes, str] = {}
    near = None if threshold is None else NearDuplicates(threshold)
    for where, record in read_questions(path, advance):
        question = record["question"]
        key, signature = question_key(question), _signature(record)
        if key in conflicting:
            report.add(CONFLICTING, where, f"{record['gold_answer']}: {question}")
        elif key in seen:
            report.add(EQUAL, where, f"as {seen[key]}: {question}")
        elif near and signatures[signature] > 1 and (other := near.add(question, signature, where)) is not None:
            report.add(NEAR, where, f"as {other}: {question}")
        else:
            report.counts[WRITTEN] += 1
            yield json_line(record)
        seen.setdefault(key, where)


class NearDuplicates:
    """An index of questions that finds an earlier one with the same signature and almost the same words."""

    def __init__(self, threshold: float):
        """Makes an empty index. threshold: Jaccard similarity of word triples, in (0, 1)."""
        self._threshold = threshold
        # Candidates are compared exactly, so the index may find too many of them and should miss few.
        self._index = MinHashLSH(threshold=threshold, num_perm=_PERMUTATIONS, weights=(0.1, 0.9))
        self._added: list[tuple[str, bytes, str]] = []
        """Question, signature, and file and line, by the key of the index."""

    def add(self, question: str, signature: bytes, where: str) -> str | None:
        """Returns the place of an earlier near duplicate; if there is none, adds the question and returns None."""
        shingles = _shingles(question)
        sketch = MinHash(num_perm=_PERMUTATIONS, hashfunc=zlib.crc32)
        sketch.update_batch([signature + shingle for shingle in shingles])
        for index in sorted(self._index.query(sketch)):
            other, other_signature, other_where = self._added[index]
            common = shingles & _shingles(other) if signature == other_signature else ()
            if len(common) >= self._threshold * len(shingles | _shingles(other)):
                return other_where
        self._index.insert(len(self._added), sketch)
        self._added.append((question, signature, where))
        return None


def _signature(record: dict[str, Any]) -> bytes:
    """Returns 16 bytes that depend on the numbers, operators and commands of a question, and on its gold answer.

    Problems that a template makes have almost the same words, and differ in these.
    """
    symbols = sorted(word for word in tokens(record["question"]) if not word.isalpha())
    return question_key(f"{' '.join(symbols)} = {gold_value(record['gold_answer'])}")


def _shingles(question: str) -> frozenset[bytes]:
    """Returns the word triples of a question."""
    words = tokens(question)
    starts = range(max(1, len(words) - _WORDS + 1))
    return frozenset(" ".join(words[start : start + _WORDS]).encode() for start in starts)
