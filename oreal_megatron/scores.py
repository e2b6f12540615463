"""Scores of a model on a benchmark, problem by problem: greedy pass@1, avg@k, pass@k, maj@k, and shares of responses.

An UNDECIDED response scores 0, as an incorrect one does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from oreal_megatron.types import FinishReason, GradedRollout, undecided
from oreal_megatron.verifier.own_reward import STAGE as OWN_REWARD

AreEqual = Callable[[Sequence[tuple[str, str]]], list[bool]]
"""Pairs of final answers -> for each pair, whether the two are equal."""


def problem_scores(
    greedy: Sequence[GradedRollout],
    sampled: Sequence[Sequence[GradedRollout]],
    are_equal: AreEqual,
    *,
    ks: Iterable[int],
) -> dict[str, list[float]]:
    """Returns name -> a score in [0, 1] for each problem: greedy_pass@1, and with n samples avg@n, pass@k, maj@n.

    Responses that a reward of the user's own graded have no answers that could vote, and so no maj@n.

    greedy: a response for each problem. sampled: n responses for each problem, or empty. ks: numbers k of pass@k; those
    that are not in 2 to n are left out.
    """
    scores = {"greedy_pass@1": [float(graded.is_correct) for graded in greedy]}
    if sampled:
        n = len(sampled[0])
        num_correct = [sum(graded.is_correct for graded in group) for group in sampled]
        scores[f"avg@{n}"] = [correct / n for correct in num_correct]
        for k in ks:
            if 1 < k <= n:
                scores[f"pass@{k}"] = [pass_at_k(n, correct, k) for correct in num_correct]
        if n > 1 and not _is_own_reward(sampled[0][0]):
            scores[f"maj@{n}"] = majority_scores(sampled, are_equal)
    return scores


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Returns the chance that k of the samples, drawn without replacement, have a correct one among them.

    It is the unbiased estimate of pass@k from more samples than k (Chen et al., arXiv 2107.03374, equation 1).
    """
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def majority_scores(groups: Sequence[Sequence[GradedRollout]], are_equal: AreEqual) -> list[float]:
    """Returns for each problem the score of the answer that most samples have; 0 where no sample has an answer.

    Answers that tie for the most votes share the score: it is their mean.
    """
    scores = []
    for group, votes in zip(groups, grouped_by_answer(groups, are_equal), strict=True):
        most = max(map(len, votes), default=0)
        leading = [[float(group[index].is_correct) for index in vote] for vote in votes if len(vote) == most]
        scores.append(mean([mean(outcomes) for outcomes in leading]) if leading else 0.0)
    return scores


def grouped_by_answer(groups: Sequence[Sequence[GradedRollout]], are_equal: AreEqual) -> list[list[list[int]]]:
    """Returns for each problem the indices of its samples, grouped by equal answers; samples without one are left out.

    An answer joins the first group whose first answer is equal to it.
    """
    by_text: list[dict[str, list[int]]] = []
    for group in groups:
        indices: dict[str, list[int]] = {}
        for index, graded in enumerate(group):
            if graded.grade.answer:
                indices.setdefault(graded.grade.answer, []).append(index)
        by_text.append(indices)
    found: list[list[list[int]]] = [[] for _ in groups]
    waiting = [list(indices) for indices in by_text]
    while any(waiting):
        # In a round every problem's first answer is compared with its others: few calls for all problems together.
        equal = iter(are_equal([(texts[0], other) for texts in waiting for other in texts[1:]]))
        for problem, texts in enumerate(waiting):
            if texts:
                same = [texts[0], *(other for other in texts[1:] if next(equal))]
                found[problem].append([index for text in same for index in by_text[problem][text]])
                waiting[problem] = [text for text in texts if text not in same]
    return found


def benchmark_metrics(
    greedy: Sequence[GradedRollout],
    sampled: Sequence[Sequence[GradedRollout]],
    scores: Mapping[str, Sequence[float]],
) -> dict[str, float]:
    """Returns name -> value of a benchmark: its counts, the means of `scores`, and shares and lengths of responses."""
    responses = all_responses(greedy, sampled)
    count = max(len(responses), 1)
    return {
        "problems": float(len(greedy)),
        "undecided": float(len(undecided(greedy))),
        "undecided_share": len(undecided(responses)) / count,
        **{name: mean(values) for name, values in scores.items()},
        "response_tokens": mean([float(graded.rollout.num_response_tokens) for graded in greedy]),
        "stopped": mean([float(is_stopped(graded)) for graded in greedy]),
        "truncated_share": sum(not is_stopped(graded) for graded in responses) / count,
        "no_answer_share": sum(_lacks_answer(graded) for graded in responses) / count,
    }


def all_responses(greedy: Sequence[GradedRollout], sampled: Sequence[Sequence[GradedRollout]]) -> list[GradedRollout]:
    """Returns the greedy responses, then the samples of every problem."""
    return [*greedy, *(graded for group in sampled for graded in group)]


def _is_own_reward(graded: GradedRollout) -> bool:
    """Returns whether a function of the user's graded a response, without extracting an answer from it."""
    return graded.grade.stage == OWN_REWARD


def _lacks_answer(graded: GradedRollout) -> bool:
    return is_stopped(graded) and not graded.grade.answer and not _is_own_reward(graded)


def is_stopped(graded: GradedRollout) -> bool:
    """Returns whether the response ends with the stop token, and not at a limit of length."""
    return graded.rollout.finish_reason is FinishReason.STOP


def mean(values: Sequence[float]) -> float:
    """Returns the mean; nan without values."""
    return math.fsum(values) / len(values) if values else math.nan
