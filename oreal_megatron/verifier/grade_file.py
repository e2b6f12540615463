"""Grades a JSONL file of answers into a JSONL file of verdicts."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from oreal_megatron.types import Grade, GradeRequest, Verdict
from oreal_megatron.verifier.api import StagedVerifier, build_verifier
from oreal_megatron.verifier.config import VerifierConfig

_BATCH = 256


@dataclass(frozen=True)
class Row:
    """A line of the input."""

    id: Any
    request: GradeRequest
    is_response: bool
    label: int | None


def read_rows(path: Path, stop_token: str) -> Iterator[Row]:
    """Yields the rows of a file. If no line holds the stop token, all responses count as stopped."""
    with path.open(encoding="utf-8", errors="surrogateescape") as file:
        stored_with_token = any(stop_token in line for line in file)
    with path.open(encoding="utf-8", errors="surrogateescape") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield _row(json.loads(line), number, stop_token if stored_with_token else None)
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from None


def _row(fields: Any, number: int, stop_token: str | None) -> Row:
    if not isinstance(fields, dict):
        raise ValueError("not a JSON object")
    gold, answer = fields.get("gold", fields.get("gold_answer")), fields.get("answer", fields.get("response"))
    if not isinstance(gold, str) or not isinstance(answer, str):
        raise ValueError(f'the keys "gold" and "answer" are needed, as strings; the line has {sorted(fields)}')
    kind = fields.get("kind", "response")
    if kind not in ("pair", "response"):
        raise ValueError(f'"kind" is {kind!r}; set it to "pair" or "response"')
    stopped = fields.get("stopped")
    if stopped is None:
        stopped = stop_token is None or answer.rstrip().endswith(stop_token)
    if kind == "response" and stop_token is not None:
        answer = answer.rstrip().removesuffix(stop_token)
    question = str(fields.get("question", ""))
    request = GradeRequest(question=question, gold_answer=gold, response=answer, stopped=bool(stopped))
    return Row(fields.get("id", number), request, kind == "response", fields.get("label"))


def grade_rows(verifier: StagedVerifier, rows: Sequence[Row]) -> list[Grade]:
    """Returns grades in the order of the rows."""
    grades: dict[int, Grade] = {}
    for is_response, grade in ((True, verifier.grade), (False, verifier.grade_answers)):
        indices = [index for index, row in enumerate(rows) if row.is_response is is_response]
        grades.update(zip(indices, grade([rows[index].request for index in indices]), strict=True))
    return [grades[index] for index in range(len(rows))]


def summary(rows: Sequence[Row], grades: Sequence[Grade], seconds: float) -> str:
    """Returns the counts of verdicts, and their accuracy if the input has labels."""
    counts = Counter(grade.verdict for grade in grades)
    text = f"{len(grades)} graded in {seconds:.1f} s: " + ", ".join(
        f"{counts[verdict]} {verdict}" for verdict in Verdict
    )
    labelled = [(row.label, grade.verdict) for row, grade in zip(rows, grades, strict=True) if row.label is not None]
    if labelled:
        right = sum(verdict is (Verdict.CORRECT if label else Verdict.INCORRECT) for label, verdict in labelled)
        false_positives = sum(verdict is Verdict.CORRECT and not label for label, verdict in labelled)
        false_negatives = sum(verdict is Verdict.INCORRECT and bool(label) for label, verdict in labelled)
        text += (
            f"\naccuracy against the labels {right / len(labelled):.4f}: "
            f"{false_positives} false positives, {false_negatives} false negatives"
        )
    return text


def grade_file(config: VerifierConfig, source: Path, output: Path, stop_token: str) -> str:
    """Grades `source` into `output`, which appears when it is complete. Returns the summary."""
    rows = list(read_rows(source, stop_token))
    grades: list[Grade] = []
    started = time.monotonic()
    partial = output.with_name(output.name + ".partial")
    console = Console(stderr=True)
    progress = Progress(*Progress.get_default_columns(), console=console, disable=not console.is_terminal)
    with build_verifier(config) as verifier, partial.open("w", encoding="utf-8") as file, progress:
        task = progress.add_task("grading", total=len(rows))
        for start in range(0, len(rows), _BATCH):
            batch = rows[start : start + _BATCH]
            for row, grade in zip(batch, grade_rows(verifier, batch), strict=True):
                grades.append(grade)
                line = {"id": row.id, "verdict": str(grade.verdict), "reason": grade.reason, "stage": grade.stage}
                file.write(json.dumps({**line, "seconds": round(grade.seconds, 6)}) + "\n")
            progress.advance(task, len(batch))
    os.replace(partial, output)
    return summary(rows, grades, time.monotonic() - started)
