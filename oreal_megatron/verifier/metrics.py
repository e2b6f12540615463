"""Counters of a verifier, read and reset once a step."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable

from oreal_megatron.types import Grade, Verdict


class VerifierMetrics:
    """Counters over the responses graded since the last drain. Threads may count at the same time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reset()

    def _reset(self) -> None:
        self._events: Counter[str] = Counter()
        self._grades: Counter[tuple[str, Verdict]] = Counter()
        self._seconds: list[float] = []

    def count(self, event: str, number: int = 1) -> None:
        """Counts an event such as `timeouts`, `cache_hits` or `judge_failures`."""
        with self._lock:
            self._events[event] += number

    def record(self, grades: Iterable[Grade]) -> None:
        """Counts grades by stage and verdict."""
        with self._lock:
            for grade in grades:
                self._grades[grade.stage, grade.verdict] += 1
                self._seconds.append(grade.seconds)

    def drain(self) -> dict[str, float]:
        """Returns `verifier/name` -> value since the last call: counts, shares, seconds a response."""
        with self._lock:
            events, grades, seconds = self._events, self._grades, sorted(self._seconds)
            self._reset()
        total = len(seconds)
        metrics = {f"verifier/num_{event}": float(number) for event, number in events.items()}
        metrics["verifier/num_graded"] = float(total)
        for verdict in Verdict:
            number = sum(count for (_, given), count in grades.items() if given is verdict)
            metrics[f"verifier/num_{verdict.lower()}"] = float(number)
            metrics[f"verifier/share_{verdict.lower()}"] = number / total if total else 0.0
        for stage in sorted({stage for stage, _ in grades}):
            metrics[f"verifier/share_by_{stage}"] = sum(n for (s, _), n in grades.items() if s == stage) / total
        rechecked = events["judge_upheld"] + events["judge_overturned"]
        if rechecked:
            metrics["verifier/judge_agreement"] = events["judge_upheld"] / rechecked
        if seconds:
            metrics["verifier/seconds_mean"] = sum(seconds) / total
            metrics["verifier/seconds_p99"] = seconds[min(total - 1, int(total * 0.99))]
        return metrics
