"""Scores of an evaluation and the area under the curve, by hand."""

from __future__ import annotations

import math

import pytest

from oreal_megatron.config import SamplingConfig
from oreal_megatron.evaluation import area_under_curve, areas_under_curve, evaluate_benchmark
from oreal_megatron.scores import benchmark_metrics, problem_scores
from oreal_megatron.types import Benchmark, Prompt, Verdict
from tests.graded import graded

C, W, U = Verdict.CORRECT, Verdict.INCORRECT, Verdict.UNDECIDED


def never_equal(pairs):
    return [False] * len(pairs)


def test_undecided_responses_count_as_not_correct():
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
    scores = problem_scores(greedy, sampled, never_equal, ks=[2])
    assert benchmark_metrics(greedy, sampled, scores) == pytest.approx(
        {
            "problems": 3.0,
            "undecided": 1.0,
            "undecided_share": 2 / 9,
            "greedy_pass@1": 1 / 3,
            "avg@2": 2 / 6,
            "pass@2": 2 / 3,
            "maj@2": 0.0,  # no response has an answer
            "response_tokens": 4.0,
            "stopped": 1.0,
            "truncated_share": 0.0,
            "no_answer_share": 1.0,
        }
    )


def test_area_under_curve_by_hand():
    assert area_under_curve([0.9, 0.8, 0.3, 0.1], [True, False, True, False]) == 0.75
    assert area_under_curve([0.5, 0.5], [True, False]) == 0.5
    assert math.isnan(area_under_curve([0.5], [True]))


def test_one_correct_among_undecided_responses_is_no_perfect_score():
    prompts = tuple(Prompt(id=str(i), question="q", gold_answer="1") for i in range(30))
    greedy = [graded(p, 0, C if p.id == "0" else U, 4) for p in prompts]
    metrics = benchmark_metrics(greedy, [], problem_scores(greedy, [], never_equal, ks=[]))
    assert metrics["greedy_pass@1"] == 1 / 30 and metrics["undecided_share"] == 29 / 30


def test_a_scorer_of_prompts_has_an_area_of_one_half_within_prompts():
    outcomes = [True, True, True, False, True, False, False, False]
    prompts = ["easy"] * 4 + ["hard"] * 4
    by_prompt = [2.0] * 4 + [-2.0] * 4
    assert areas_under_curve(by_prompt, outcomes, prompts) == {"auc": 0.75, "auc_within_prompts": 0.5}
    right = [score + outcome for score, outcome in zip(by_prompt, outcomes, strict=True)]
    assert areas_under_curve(right, outcomes, prompts)["auc_within_prompts"] == 1.0
    # Two pairs of "a", of which one is in order, and one pair of "b" in order: 2 of 3.
    scores, outcomes = [3.0, 1.0, 2.0, 5.0, 4.0], [False, False, True, True, False]
    found = areas_under_curve(scores, outcomes, ["a", "a", "a", "b", "b"])
    assert found["auc_within_prompts"] == pytest.approx(2 / 3)
    assert math.isnan(areas_under_curve([1, 2], [True, False], ["a", "b"])["auc_within_prompts"])
