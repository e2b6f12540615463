"""The interface of the verifier: requests in, grades out, in order."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

from oreal_megatron.types import Grade, GradeRequest, Verdict
from oreal_megatron.verifier.cache import VerdictCache, cache_key
from oreal_megatron.verifier.config import VerifierConfig
from oreal_megatron.verifier.equality.leaves import NeedsSympy, RationalLeaves
from oreal_megatron.verifier.extract import Extraction, extract
from oreal_megatron.verifier.judge.judge import Judge
from oreal_megatron.verifier.metrics import VerifierMetrics
from oreal_megatron.verifier.outcome import RULES, Outcome
from oreal_megatron.verifier.own_reward import grades_of
from oreal_megatron.verifier.rules import compare_final
from oreal_megatron.verifier.workers.pool import Job, WorkerPool


@dataclass
class _Case:
    """A request on its way through the stages."""

    request: GradeRequest
    extraction: Extraction | None = None
    outcome: Outcome | None = None
    seconds: float = 0.0

    @property
    def job(self) -> Job:
        assert self.extraction is not None
        return self.request.gold_answer, self.extraction.answers, self.extraction.earlier

    @property
    def answer(self) -> str:
        return ", ".join(dict.fromkeys(self.extraction.answers)) if self.extraction else ""


class StagedVerifier:
    """Grades in stages (stop rule, extraction, rules, judge); each stage passes on the cases that it cannot decide."""

    def __init__(self, config: VerifierConfig, reward: Callable[..., Any] | None = None) -> None:
        self.config = config
        self._reward = reward
        self._pool = WorkerPool(config.num_workers, config.timeout_seconds, config.memory_limit_mb)
        self._cache = VerdictCache(config.cache_path) if config.cache_path is not None else None
        self._judge = Judge(config.judge) if config.judge.mode != "off" else None
        self._metrics = VerifierMetrics()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stops the worker processes and closes the cache. A later call of `grade` starts them again."""
        self._pool.close()
        if self._cache is not None:
            self._cache.close()

    def processes(self) -> list[int]:
        """Returns the ids of the processes that compare symbolic answers; none before the first such answer."""
        return self._pool.processes()

    def drain_metrics(self) -> dict[str, float]:
        """Returns `verifier/name` -> value over the responses graded since the last call."""
        return self._metrics.drain()

    def grade(self, requests: Sequence[GradeRequest]) -> list[Grade]:
        """Returns a grade for each request, in order. Never raises for a bad answer."""
        if self._reward is not None:
            seconds, concurrency = self.config.timeout_seconds, self.config.num_workers
            grades = grades_of(self._reward, requests, seconds=seconds, concurrency=concurrency)
            self._metrics.record(grades)
            return grades
        return self._grade_cases([self._first_stages(request) for request in requests])

    def grade_answers(self, requests: Sequence[GradeRequest]) -> list[Grade]:
        """Grades responses that are the bare final answer, without stop rule and extraction. Otherwise like `grade`."""
        return self._grade_cases([self._answer_case(request) for request in requests])

    def are_equal(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """Returns for each pair of final answers whether the rules find them equal, with either as the gold answer.

        No judge is asked, and the metrics do not count the pairs as responses.
        """
        directed = [pair for first, second in pairs for pair in ((first, second), (second, first))]
        cases = [
            self._answer_case(GradeRequest(question="", gold_answer=gold, response=answer, stopped=True))
            for gold, answer in directed
        ]
        self._compare(cases)
        verdicts = [_grade(case).verdict for case in cases]
        return [Verdict.CORRECT in verdicts[start : start + 2] for start in range(0, len(verdicts), 2)]

    def _answer_case(self, request: GradeRequest) -> _Case:
        """Returns the case of a response that is the bare final answer, compared as far as that needs no sympy."""
        case = _Case(request, Extraction(answers=(request.response,)))
        self._compare_fast(case)
        return case

    def _compare(self, cases: Sequence[_Case]) -> None:
        """Fills in the rules' outcome of every case that has none, from the cache or by the worker processes."""
        waiting = self._from_cache([case for case in cases if case.outcome is None], self._rules_key)
        self._compare_in_pool(waiting)
        self._to_cache(waiting, self._rules_key)

    def _grade_cases(self, cases: list[_Case]) -> list[Grade]:
        self._compare(cases)
        if self._judge is not None:
            waiting = self._from_cache([case for case in cases if self._is_for_judge(case)], self._judge_key)
            self._ask_judge(waiting)
            self._to_cache(waiting, self._judge_key)
        grades = [_grade(case) for case in cases]
        self._metrics.record(grades)
        return grades

    def _first_stages(self, request: GradeRequest) -> _Case:
        """Applies the stop rule, extraction, and the rules for answers that need no sympy."""
        started = time.perf_counter()
        case = _Case(request)
        if not request.stopped:
            case.outcome = Outcome(Verdict.INCORRECT, "the response did not end with the stop token", "stop")
            return case
        case.extraction = extract(request.response, self.config.thinking_end_marks)
        if case.extraction.refusal is not None:
            case.outcome = Outcome(Verdict.INCORRECT, case.extraction.refusal, "extract")
        case.seconds = time.perf_counter() - started
        if case.outcome is None:
            self._compare_fast(case)
        return case

    @staticmethod
    def _compare_fast(case: _Case) -> None:
        """Applies the rules in this process, which decides plain numbers and equal texts."""
        started = time.perf_counter()
        with contextlib.suppress(NeedsSympy, RecursionError):
            case.outcome = compare_final(*case.job, RationalLeaves())
        case.seconds += time.perf_counter() - started

    def _compare_in_pool(self, cases: Sequence[_Case]) -> None:
        """Compares each distinct pair once, since the responses of a group often agree."""
        same: dict[Job, list[_Case]] = {}
        for case in cases:
            same.setdefault(case.job, []).append(case)
        restarts = self._pool.num_restarts
        for sharing, timed in zip(same.values(), self._pool.compare(list(same)), strict=True):
            self._metrics.count("timeouts", len(sharing) * timed.timed_out)
            for case in sharing:
                case.outcome = timed.outcome
                case.seconds += timed.seconds
        self._metrics.count("worker_restarts", self._pool.num_restarts - restarts)

    def _is_for_judge(self, case: _Case) -> bool:
        """Whether the judge may overrule the outcome: never that of a guard, the stop rule or extraction."""
        outcome = case.outcome
        if outcome is None or outcome.stage != RULES or len(case.answer) > self.config.judge.max_answer_chars:
            return False
        if outcome.verdict is Verdict.INCORRECT:
            return self.config.judge.mode == "recheck_negatives"
        return outcome.verdict is Verdict.UNDECIDED

    def _ask_judge(self, cases: Sequence[_Case]) -> None:
        assert self._judge is not None
        items = [replace(case.request, response=case.answer) for case in cases]
        started = time.perf_counter()
        outcomes = self._judge.judge(items)
        seconds = time.perf_counter() - started
        self._metrics.count("judged", len(cases))
        for case, outcome in zip(cases, outcomes, strict=True):
            if outcome.verdict is Verdict.UNDECIDED:
                self._metrics.count("judge_failures")
            elif case.outcome is not None and case.outcome.verdict is Verdict.INCORRECT:
                self._metrics.count("judge_upheld" if outcome.verdict is Verdict.INCORRECT else "judge_overturned")
            case.outcome = outcome
            case.seconds += seconds

    def _rules_key(self, case: _Case) -> str:
        return cache_key("rules", *case.job)

    def _judge_key(self, case: _Case) -> str:
        judge = self.config.judge
        return cache_key("judge", judge.model, judge.enforce_json, case.request.question, *case.job)

    def _from_cache(self, cases: list[_Case], key_of: Callable[[_Case], str]) -> list[_Case]:
        """Fills in the outcomes that the cache holds. Returns the other cases."""
        if self._cache is None or not cases:
            return cases
        keys = [key_of(case) for case in cases]
        known = self._cache.get(keys)
        for case, key in zip(cases, keys, strict=True):
            case.outcome = known.get(key, case.outcome)
        self._metrics.count("cache_hits", sum(key in known for key in keys))
        return [case for case, key in zip(cases, keys, strict=True) if key not in known]

    def _to_cache(self, cases: Iterable[_Case], key_of: Callable[[_Case], str]) -> None:
        if self._cache is not None:
            self._cache.put({key_of(case): case.outcome for case in cases if case.outcome is not None})


def _grade(case: _Case) -> Grade:
    outcome = case.outcome
    assert outcome is not None
    return Grade(
        verdict=outcome.verdict, reason=outcome.reason, stage=outcome.stage, answer=case.answer, seconds=case.seconds
    )


def build_verifier(config: VerifierConfig, reward: Callable[..., Any] | None = None) -> StagedVerifier:
    """Builds the verifier that the config describes. reward: function of a user's that grades in its place."""
    return StagedVerifier(config, reward)
