"""Shaped rewards and selection against values worked out by hand."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from oreal_megatron.config import ObjectiveConfig, TrainConfig, parse_config
from oreal_megatron.losses.advantages import (
    Selection,
    group_advantages,
    is_useful,
    select_trajectories,
    shaped_rewards,
)
from oreal_megatron.types import FinishReason, Grade, GradedRollout, Prompt, Rollout, Verdict

C, I, U = Verdict.CORRECT, Verdict.INCORRECT, Verdict.UNDECIDED


def objective(composed: Any, preset: str, **changes: Any) -> ObjectiveConfig:
    config: TrainConfig = parse_config(composed(f"objective={preset}"))
    return config.objective.model_copy(update=changes)


def group(verdicts: list[Verdict], prompt_id: str = "p") -> list[GradedRollout]:
    prompt = Prompt(id=prompt_id, question="1+1", gold_answer="2")
    return [
        GradedRollout(
            rollout=Rollout(
                prompt=prompt,
                sample_index=index,
                prompt_ids=(1, 2),
                response_ids=(3, 4),
                logprobs=(-0.1, -0.2),
                text="",
                finish_reason=FinishReason.STOP,
                weight_spans=(),
            ),
            grade=Grade(verdict=verdict, reason="", stage="rules"),
        )
        for index, verdict in enumerate(verdicts)
    ]


def select(groups: list[list[GradedRollout]], config: ObjectiveConfig, step: int = 0, seed: int = 0) -> Selection:
    return select_trajectories(groups, config, seed=seed, step=step, global_rng=random.Random(7))


# n = 4, p = 1/4; the correct response first.
@pytest.mark.parametrize(
    ("shaping", "reward_values", "correct", "incorrect"),
    [
        ("rloo", (0.0, 1.0), 1.0, -1 / 3),
        ("rloo", (-1.0, 1.0), 2.0, -2 / 3),
        ("paper", (-1.0, 1.0), 1.0, -0.75),
        ("raw", (-1.0, 1.0), 1.0, -1.0),
        # mean -1/2, population std sqrt(3)/2
        ("grpo", (-1.0, 1.0), 1.5 / (0.75**0.5 + 1e-6), -0.5 / (0.75**0.5 + 1e-6)),
        ("positive_one", (-1.0, 1.0), 1.0, 1.0),
        ("negative_one", (-1.0, 1.0), -1.0, -1.0),
    ],
)
def test_shaped_rewards_by_hand(composed, shaping, reward_values, correct, incorrect):
    config = objective(composed, "oreal", shaping=shaping, reward_values=reward_values)
    assert shaped_rewards([True, False, False, False], config) == pytest.approx([correct, *[incorrect] * 3])


def test_rloo_on_minus_one_to_one_is_the_closed_form(composed):
    config = objective(composed, "oreal")
    n, num_correct = 16, 5
    p = num_correct / n
    values = shaped_rewards([True] * num_correct + [False] * (n - num_correct), config)
    assert values[0] == pytest.approx(2 * (1 - p) * n / (n - 1))
    assert values[-1] == pytest.approx(-2 * p * n / (n - 1))


def test_grpo_has_no_effect_without_spread(composed):
    assert shaped_rewards([True, True], objective(composed, "grpo")) == [0.0, 0.0]


def test_undecided_responses_are_in_no_statistic(composed):
    config = objective(composed, "oreal_no_rm")
    with_undecided = select([group([C, I, U, I, U, I])], config)
    without = select([group([C, I, I, I])], config)
    assert [t.advantage for t in with_undecided.trajectories] == [t.advantage for t in without.trajectories]
    assert with_undecided.num_undecided == 2
    assert with_undecided.pass_rate == without.pass_rate == 0.25
    assert {t.rollout.sample_index for t in with_undecided.trajectories} == {0, 1, 3, 5}


def test_the_release_counts_undecided_as_incorrect(composed):
    selection = select([group([C, U])], objective(composed, "oreal_release"))
    assert [t.correct for t in selection.trajectories] == [True, False]
    assert select([group([C, U])], objective(composed, "oreal")).trajectories == ()


def test_groups_without_signal_are_dropped_and_counted(composed):
    groups = [group([C, C], "a"), group([I, I], "b"), group([C, U], "c"), group([C, I], "d")]
    selection = select(groups, objective(composed, "oreal"))
    assert {t.rollout.prompt.id for t in selection.trajectories} == {"d"}
    assert (selection.num_kept_groups, selection.num_all_correct, selection.num_all_incorrect) == (1, 2, 1)


@pytest.mark.parametrize(
    ("preset", "kept", "trained"),
    [
        ("reinforce", 3, 6),
        ("rloo", 3, 6),
        ("grpo", 3, 6),
        ("raft", 2, 3),
        ("reinforce_rej", 1, 2),
        ("psr", 2, 3),
        ("nsr", 2, 3),
        ("oreal_no_rm", 1, 2),
        ("oreal", 1, 2),
    ],
)
def test_presets_keep_and_train_what_the_table_says(composed, preset, kept, trained):
    selection = select([group([C, C], "a"), group([I, I], "b"), group([C, I], "c")], objective(composed, preset))
    assert (selection.num_kept_groups, len(selection.trajectories)) == (kept, trained)


def test_a_pair_depends_on_seed_step_and_prompt_only(composed):
    config = objective(composed, "oreal")
    groups = [group([C, I] * 8, f"p{i}") for i in range(20)]

    def chosen(groups, **key):
        return {t.id for t in select(groups, config, **key).trajectories}

    assert chosen(groups) == chosen(groups[::-1])
    assert chosen(groups, step=1) != chosen(groups)
    assert chosen(groups, seed=1) != chosen(groups)


def test_the_release_draws_pairs_from_one_generator(composed):
    config = objective(composed, "oreal_release")
    groups = [group([C, I] * 8, f"p{i}") for i in range(20)]
    ids = {t.id for t in select(groups, config).trajectories}
    assert ids != {t.id for t in select(groups[::-1], config).trajectories}


def test_one_response_a_group_is_no_group_for_rloo(composed):
    assert select([group([C])], objective(composed, "rloo")).trajectories == ()


def test_a_group_is_of_use_where_some_of_it_trains(composed):
    oreal, nsr = objective(composed, "oreal"), objective(composed, "nsr")
    assert [is_useful(group(verdicts), oreal) for verdicts in ([C, I], [C, U], [I, I], [U, U])] == [True] + [False] * 3
    assert [is_useful(group(verdicts), nsr) for verdicts in ([C, I], [C, U], [I, I], [U, U])] == [1, 0, 1, 0]


def test_partial_credit_lies_between_the_rewards(composed):
    config = objective(composed, "rloo")
    values = shaped_rewards([True, False, False], config, credits=[1.0, 0.5, 0.0])  # rewards 1, 0, -1
    assert values == pytest.approx([1.5, 0.0, -1.5])
    assert shaped_rewards([True, False, False], config, credits=[1.0, 0.0, 0.0]) == shaped_rewards(
        [True, False, False], config
    )


def test_credit_changes_no_advantage_where_the_reward_model_weighs_tokens(composed):
    """The weights of an INCORRECT response have the direction of its outcome, whatever its credit."""
    responses = [
        replace(one, grade=replace(one.grade, credit=credit))
        for one, credit in zip(group([C, I, I, I]), [1.0, 0.8, 0.0, 0.0], strict=True)
    ]
    with_reward_model = group_advantages(responses, objective(composed, "oreal"))
    assert with_reward_model == shaped_rewards([True, False, False, False], objective(composed, "oreal"))
    assert group_advantages(responses, objective(composed, "grpo"))[1] > 0


def test_advantages_that_are_equal_but_for_rounding_normalize_to_zero(composed):
    groups = [
        [replace(one, grade=replace(one.grade, credit=credit)) for one in group([I] * 6)] for credit in (0.1, 0.7)
    ]
    config = objective(composed, "reinforce_pp")
    selection = select_trajectories(groups, config, seed=0, step=0, global_rng=random.Random(0))
    assert {trajectory.advantage for trajectory in selection.trajectories} == {0.0}
