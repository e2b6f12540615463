"""pass@1, avg@k, pass@k and the area under the curve, by hand."""

from __future__ import annotations

import math

import pytest

from oreal_megatron.config import SamplingConfig
from oreal_megatron.evaluation import area_under_curve, benchmark_metrics, evaluate_benchmark
from oreal_megatron.types import Benchmark, FinishReason, Grade, GradedRollout, Prompt, Rollout, Verdict, WeightSpan

C, W, U = Verdict.CORRECT, Verdict.INCORRECT, Verdict.UNDECIDED


def graded(prompt: Prompt, index: int, verdict: Verdict, length: int) -> GradedRollout:
    rollout = Rollout(
        prompt=prompt, sample_index=index, prompt_ids=(1,), response_ids=(2,) * length, logprobs=(-1.0,) * length,
        text="", finish_reason=FinishReason.STOP, weight_spans=(WeightSpan(version=0, start=0, end=length),),
    )  # fmt: skip
    return GradedRollout(rollout=rollout, grade=Grade(verdict=verdict, reason="", stage="rules"))


def test_metrics_leave_undecided_responses_out():
    prompts = tuple(Prompt(id=str(i), question="q", gold_answer="1") for i in range(3))
    greedy = [[C], [W], [U]]
    sampled = [[C, W], [W, W], [U, C]]
    temperatures = []

    def generate(asked, num_samples, sampling):
        temperatures.append(sampling.temperature)
        table = greedy if num_samples == 1 else sampled
        return [[graded(p, i, v, 4) for i, v in enumerate(row)] for p, row in zip(asked, table, strict=True)]

    sampling = SamplingConfig(temperature=0.7, top_p=0.9, max_new_tokens=8)
    benchmark = Benchmark(name="b", prompts=prompts, samples=2)
    greedy, sampled = evaluate_benchmark(benchmark, generate, sampling)
    assert temperatures == [0.0, 0.7]
    assert benchmark_metrics(benchmark, greedy, sampled) == pytest.approx(
        {
            "b/problems": 3.0,
            "b/undecided": 1.0,
            "b/greedy_pass@1": 1 / 2,
            "b/response_tokens": 4.0,
            "b/stopped": 1.0,
            "b/avg@2": 2 / 5,
            "b/pass@2": 2 / 3,
        }
    )


def test_area_under_curve_by_hand():
    assert area_under_curve([0.9, 0.8, 0.3, 0.1], [True, False, True, False]) == 0.75
    assert area_under_curve([0.5, 0.5], [True, False]) == 0.5
    assert math.isnan(area_under_curve([0.5], [True]))
