"""The verifier as the trainer sees it: requests in, grades out, in order."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from types import TracebackType
from typing import Protocol, Self

from oreal_megatron.records import Grade, GradeRequest, Verdict
from oreal_megatron.verifier.config import VerifierConfig
from oreal_megatron.verifier.extract import Extraction, extract
from oreal_megatron.verifier.normalize import normalize
from oreal_megatron.verifier.outcome import Outcome, different, unknown
from oreal_megatron.verifier.pool import WorkerPool
from oreal_megatron.verifier.rules import NeedsSympy, RationalLeaves, compare_answers


class Verifier(Protocol):
    """Grades responses."""

    def grade(self, requests: Sequence[GradeRequest]) -> list[Grade]:
        """One grade for each request, in order. Never raises for a bad answer."""
        ...

    def close(self) -> None:
        """Release processes and connections."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: object) -> None: ...


class StagedVerifier:
    """The stop rule, extraction and rules; what needs sympy goes to a pool of processes."""

    def __init__(self, config: VerifierConfig) -> None:
        self.config = config
        self.counts: Counter[str] = Counter()
        self._pool = WorkerPool(config.num_workers, config.timeout_seconds, config.memory_limit_mb)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._pool.close()

    def grade(self, requests: Sequence[GradeRequest]) -> list[Grade]:
        """One grade for each request, in order. Never raises for a bad answer."""
        grades: list[Grade | None] = [None] * len(requests)
        waiting: dict[tuple[str, str], list[int]] = {}
        for index, request in enumerate(requests):
            started = time.perf_counter()
            stage, result = self._without_sympy(request)
            if isinstance(result, str):
                waiting.setdefault((request.gold_answer, result), []).append(index)
            else:
                grades[index] = _grade(result, stage, time.perf_counter() - started)
        for indices, timed in zip(waiting.values(), self._pool.compare(list(waiting)), strict=True):
            for index in indices:
                grades[index] = _grade(timed.outcome, "rules", timed.seconds)
        for grade in grades:
            assert grade is not None
            self.counts[f"{grade.stage}/{grade.verdict}"] += 1
        return [grade for grade in grades if grade is not None]

    def _without_sympy(self, request: GradeRequest) -> tuple[str, Outcome | str]:
        """(stage, outcome), or (stage, the answer that a worker must compare)."""
        if not request.stopped:
            return "stop", different("the response did not end with the stop token")
        try:
            extraction = extract(request.response, self.config.thinking_end_marks)
            if extraction.refusal is not None:
                return "extract", different(extraction.refusal)
            answer = _joined(extraction)
            if _contradicts(extraction):
                return "extract", different("the final part boxes different answers")
            return "rules", compare_answers(request.gold_answer, answer, RationalLeaves())
        except NeedsSympy:
            return "rules", answer
        except RecursionError:
            return "rules", unknown("the answer is nested too deeply")


def _joined(extraction: Extraction) -> str:
    return ", ".join(extraction.answers)


def _contradicts(extraction: Extraction) -> bool:
    """Whether an earlier box of the final part says something else than the last ones."""
    stated = {normalize(answer).replace(" ", "") for answer in (*extraction.answers, _joined(extraction))}
    return any(normalize(earlier).replace(" ", "") not in stated for earlier in extraction.earlier)


def _grade(outcome: Outcome, stage: str, seconds: float) -> Grade:
    return Grade(verdict=Verdict(outcome.verdict), reason=outcome.reason, stage=stage, seconds=seconds)


def build_verifier(config: VerifierConfig) -> Verifier:
    """The verifier that the config describes."""
    return StagedVerifier(config)
