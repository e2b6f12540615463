"""pass@1, avg@k and pass@k on benchmark problems."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from oreal_megatron.config import SamplingConfig
from oreal_megatron.types import FinishReason, GradedRollout, Prompt, Verdict

Generate = Callable[[Sequence[Prompt], int, SamplingConfig], list[list[GradedRollout]]]
"""(prompts, samples each, sampling) -> a graded group a prompt."""


@dataclass(frozen=True)
class Benchmark:
    """One evaluation set."""

    name: str
    prompts: tuple[Prompt, ...]
    samples: int
    """k of avg@k and pass@k; 0: greedy only."""


@dataclass(frozen=True)
class BenchmarkResult:
    """The graded responses of one benchmark, and what they come to."""

    benchmark: Benchmark
    greedy: list[GradedRollout]
    sampled: list[list[GradedRollout]]
    """k a prompt; empty where k is 0."""

    @property
    def metrics(self) -> dict[str, float]:
        """UNDECIDED responses are left out of every average. A metric that nothing was decided for is nan."""
        k = self.benchmark.samples
        values = {
            "greedy_pass@1": _mean([_outcome(graded) for graded in self.greedy]),
            "response_tokens": _mean([float(len(graded.rollout.response_ids)) for graded in self.greedy]),
            "stopped": _mean([float(g.rollout.finish_reason is FinishReason.STOP) for g in self.greedy]),
        }
        if k:
            outcomes = [[_outcome(graded) for graded in group] for group in self.sampled]
            values[f"avg@{k}"] = _mean([value for group in outcomes for value in group])
            if k > 1:
                decided = [[value for value in group if value is not None] for group in outcomes]
                values[f"pass@{k}"] = _mean([max(group) for group in decided if group])
        return {f"{self.benchmark.name}/{name}": value for name, value in values.items()}


def evaluate(benchmark: Benchmark, generate: Generate, sampling: SamplingConfig) -> BenchmarkResult:
    """Greedy responses, and `samples` more by `sampling`; both share its token limit."""
    greedy_sampling = sampling.model_copy(update={"temperature": 0.0, "top_p": 1.0})
    greedy = generate(benchmark.prompts, 1, greedy_sampling)
    sampled = generate(benchmark.prompts, benchmark.samples, sampling) if benchmark.samples else []
    return BenchmarkResult(benchmark, [group[0] for group in greedy], sampled)


def area_under_curve(scores: Sequence[float], outcomes: Sequence[bool]) -> float:
    """Probability that a correct response scores above an incorrect one, ties counting half; nan without both."""
    values, correct = np.asarray(scores, dtype=np.float64), np.asarray(outcomes, dtype=bool)
    positive, negative = values[correct], np.sort(values[~correct])
    if not len(positive) or not len(negative):
        return math.nan
    below = np.searchsorted(negative, positive, side="left")
    not_above = np.searchsorted(negative, positive, side="right")
    return float((below + not_above).mean() / (2 * len(negative)))


def _outcome(graded: GradedRollout) -> float | None:
    return None if graded.verdict is Verdict.UNDECIDED else float(graded.verdict is Verdict.CORRECT)


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else math.nan
