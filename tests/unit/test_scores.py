"""avg@k, pass@k and maj@k of problems, by hand."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from oreal_megatron.scores import benchmark_metrics, grouped_by_answer, majority_scores, pass_at_k, problem_scores
from oreal_megatron.types import GradedRollout, Prompt, Verdict
from oreal_megatron.verifier import StagedVerifier, VerifierConfig, build_verifier
from tests.graded import graded

C, W, U = Verdict.CORRECT, Verdict.INCORRECT, Verdict.UNDECIDED


@pytest.fixture(scope="module")
def verifier():
    with build_verifier(VerifierConfig(num_workers=1, timeout_seconds=15.0)) as shared:
        yield shared


def group(*responses: tuple[Verdict, str], id: str = "p") -> list[GradedRollout]:
    prompt = Prompt(id=id, question="q", gold_answer="1")
    return [graded(prompt, i, verdict, answer=answer) for i, (verdict, answer) in enumerate(responses)]


def by_text(pairs):
    return [a == b for a, b in pairs]


def test_pass_at_k_is_the_share_of_draws_with_a_correct_sample():
    assert pass_at_k(4, 1, 2) == 0.5  # 3 of 6 pairs have it
    assert pass_at_k(16, 3, 1) == pytest.approx(3 / 16)
    assert pass_at_k(5, 0, 5) == 0.0 and pass_at_k(5, 4, 2) == 1.0
    for correct, k in itertools.product(range(7), range(1, 7)):
        draws = list(itertools.combinations([index < correct for index in range(6)], k))
        assert pass_at_k(6, correct, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_rewards_of_ones_own_have_no_answers_that_could_vote():
    sampled = [[replace(one, grade=replace(one.grade, stage="reward")) for one in group((C, ""), (W, ""))]]
    scores = problem_scores([sampled[0][0]], sampled, by_text, ks=[2])
    assert scores == {"greedy_pass@1": [1.0], "avg@2": [0.5], "pass@2": [1.0]}
    assert benchmark_metrics([sampled[0][0]], sampled, scores)["no_answer_share"] == 0.0


def test_scores_of_problems():
    sampled = [group((C, "1"), (C, "1"), (W, "2"), (W, "2")), group((W, "3"), (W, "4"), (C, "1"), (U, "5"), id="r")]
    greedy = [sampled[0][0], sampled[1][3]]
    scores = problem_scores(greedy, sampled, by_text, ks=[1, 2, 4, 8])
    assert scores == {
        "greedy_pass@1": [1.0, 0.0],
        "avg@4": [0.5, 0.25],
        "pass@2": [pytest.approx(5 / 6), 0.5],
        "pass@4": [1.0, 1.0],
        "maj@4": [0.5, 0.25],  # two of two tie, and one of four
    }
    assert problem_scores(greedy, [], by_text, ks=[2]) == {"greedy_pass@1": [1.0, 0.0]}


def test_majority_counts_equal_answers_however_they_are_written(verifier: StagedVerifier):
    # One half four times, in four spellings, against 2 three times and two responses without an answer.
    halves = [(C, r"\frac{1}{2}"), (C, "0.5"), (C, r"\dfrac12"), (C, r"\frac{\sqrt{4}}{4}")]
    others = [(W, "2"), (W, "2"), (W, "2.0"), (W, ""), (U, "")]
    assert majority_scores([group(*others, *halves)], verifier.are_equal) == [1.0]
    assert majority_scores([group(*others, *halves)], by_text) == [0.0]  # the texts alone
    assert grouped_by_answer([group(*others, *halves)], verifier.are_equal) == [[[0, 1, 2], [5, 6, 7, 8]]]


def test_problems_are_grouped_together_in_few_calls():
    calls = []

    def counted(pairs):
        calls.append(len(pairs))
        return by_text(pairs)

    problems = [group((W, "a"), (W, "b"), (W, "a"), (C, "c"), id=str(i)) for i in range(3)]
    assert grouped_by_answer(problems, counted) == [[[0, 2], [1], [3]]] * 3
    assert calls == [6, 3, 0]


def test_without_any_answer_the_majority_is_wrong():
    assert majority_scores([group((W, ""), (W, ""))], by_text) == [0.0]


def test_shares_of_responses():
    prompt = Prompt(id="p", question="q", gold_answer="1")
    greedy = [graded(prompt, 0, C, 6, answer="1")]
    sampled = [[graded(prompt, 0, W, stopped=False), graded(prompt, 1, W), graded(prompt, 2, U, answer="x")]]
    metrics = benchmark_metrics(greedy, sampled, {})
    assert metrics["truncated_share"] == metrics["no_answer_share"] == metrics["undecided_share"] == 0.25
    assert metrics["response_tokens"] == 6.0 and metrics["stopped"] == 1.0


def test_equality_takes_either_answer_as_the_gold_one_and_asks_no_judge(verifier: StagedVerifier):
    verifier.drain_metrics()
    assert verifier.are_equal([("7", r"7\text{ cm}"), (r"7\text{ cm}", "7"), ("7", "8"), ("x", "y")]) == [
        True, True, False, False,
    ]  # fmt: skip
    assert sum(verifier.drain_metrics().values()) == 0
