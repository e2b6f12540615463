"""Overlap of training questions with benchmarks, by the n-grams of words that they share."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from oreal_megatron.data.curation.checking import read_questions
from oreal_megatron.data.curation.report import Report
from oreal_megatron.data.curation.text import numbers, tokens
from oreal_megatron.files import json_line, write_parts_atomically

WRITTEN, CONTAMINATED = "written", "overlaps with a benchmark"


@dataclass(frozen=True)
class Match:
    """A training question that has much of a benchmark's question."""

    line: str
    """File and line of the training question."""
    question: str
    benchmark_line: str
    """File and line of the benchmark's question."""
    benchmark_question: str
    overlap: float
    """Share of the benchmark question's words that are in n-grams of the training question, in [0, 1]."""


class BenchmarkIndex:
    """An index of the n-grams of benchmark questions."""

    def __init__(self, paths: Sequence[Path], *, num_words: int, advance: Callable[[], None]):
        """Reads the benchmarks. num_words: words of an n-gram; a shorter question is one n-gram."""
        self._num_words = num_words
        self._questions: list[tuple[str, str]] = []
        self._lengths: list[int] = []
        self._numbers: list[Counter[str]] = []
        self._places: defaultdict[tuple[str, ...], list[tuple[int, int]]] = defaultdict(list)
        for path in paths:
            for where, record in read_questions(path, advance):
                words = tokens(record["question"])
                size = min(num_words, len(words))
                for start in range(len(words) - size + 1 if words else 0):
                    self._places[tuple(words[start : start + size])].append((len(self._lengths), start))
                self._questions.append((where, record["question"]))
                self._lengths.append(len(words))
                self._numbers.append(numbers(words))
        self._sizes = sorted({min(num_words, length) for length in self._lengths if length})

    def best_match(self, question: str, where: str) -> Match | None:
        """Returns the benchmark question of which the question has the most words; None where there is none.

        The question must have all of its numbers: templates make many problems that differ in their numbers alone.
        """
        words = tokens(question)
        its_numbers = numbers(words)
        covered: defaultdict[int, set[int]] = defaultdict(set)
        for size in self._sizes:
            for start in range(len(words) - size + 1):
                for index, at in self._places.get(tuple(words[start : start + size]), ()):
                    covered[index].update(range(at, at + size))
        overlaps = {
            index: len(positions) / self._lengths[index]
            for index, positions in covered.items()
            if self._numbers[index] <= its_numbers
        }
        if not overlaps:
            return None
        best = max(overlaps, key=lambda index: (overlaps[index], -index))
        return Match(where, question, *self._questions[best], overlaps[best])


def decontaminate(
    path: Path,
    output: Path,
    benchmarks: BenchmarkIndex,
    *,
    min_overlap: float,
    matches: Path | None,
    advance: Callable[[], None],
) -> Report:
    """Writes the lines whose questions have less than `min_overlap` of every benchmark question.

    matches: JSONL file to write with every match; None: none is written.
    """
    report = Report()
    found: list[Match] = []
    write_parts_atomically(output, _clean_lines(path, benchmarks, min_overlap, found, report, advance))
    if matches is not None:
        write_parts_atomically(matches, (json_line(asdict(match)) for match in found))
    return report


def _clean_lines(
    path: Path,
    benchmarks: BenchmarkIndex,
    min_overlap: float,
    found: list[Match],
    report: Report,
    advance: Callable[[], None],
) -> Iterator[bytes]:
    for where, record in read_questions(path, advance):
        match = benchmarks.best_match(record["question"], where)
        if match is None or match.overlap < min_overlap:
            report.counts[WRITTEN] += 1
            yield json_line(record)
        else:
            found.append(match)
            text = f"{match.overlap:.0%} of {match.benchmark_line}: {match.question} | {match.benchmark_question}"
            report.add(CONTAMINATED, where, text)
