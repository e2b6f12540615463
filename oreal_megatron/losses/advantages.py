"""Advantages of graded rollouts, and the selection of those that train: group statistics, shaped rewards, choice."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from oreal_megatron.config import ObjectiveConfig
from oreal_megatron.extensions import described, objective_function
from oreal_megatron.seeds import derive_seed
from oreal_megatron.types import GradedRollout, Trajectory, decided

# Spread of advantages that are equal but for rounding.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Selection:
    """Trajectories that a step trains on, and counts of the groups and responses that they were selected from."""

    trajectories: tuple[Trajectory, ...]
    num_groups: int
    num_kept_groups: int
    num_all_correct: int
    num_all_incorrect: int
    num_undecided: int
    """Number of responses that are left out of their group's statistics and of every denominator."""
    pass_rate: float
    """Share of the step's decided responses that is CORRECT; nan where none is decided."""

    @property
    def why_unusable(self) -> str:
        """Reason for which a step without trajectories updates nothing."""
        return (
            f"no usable group among {self.num_groups}: {self.num_all_correct} all correct, "
            f"{self.num_all_incorrect} all incorrect, {self.num_undecided} responses undecided"
        )


def select_trajectories(
    groups: Sequence[Sequence[GradedRollout]],
    config: ObjectiveConfig,
    *,
    seed: int,
    step: int,
    global_rng: random.Random,
) -> Selection:
    """Shapes the rewards of every group and chooses the responses that train.

    seed, step: fix the pairs under `pair_choice: seeded`, which are the same on every rank and every repetition.
    global_rng: draws the pairs under `pair_choice: global_rng`, as the release does.
    """
    trajectories: list[Trajectory] = []
    kept = all_correct = all_incorrect = undecided = num_decided = num_correct = 0
    for group in groups:
        used = used_responses(group, config)
        outcomes = [graded.is_correct for graded in used]
        undecided += len(group) - len(used)
        num_decided += len(used)
        num_correct += sum(outcomes)
        all_correct += bool(outcomes) and all(outcomes)
        all_incorrect += bool(outcomes) and not any(outcomes)
        if not _is_kept(used, config):
            continue
        kept += 1
        advantages = group_advantages(used, config)
        candidates = [
            Trajectory(rollout=graded.rollout, correct=graded.is_correct, advantage=advantage)
            for graded, advantage in zip(used, advantages, strict=True)
        ]
        if config.pair_choice == "global_rng":
            rng = global_rng
        else:
            rng = random.Random(derive_seed(seed, step, "pair", candidates[0].rollout.prompt.id))
        trajectories += _chosen(candidates, config, rng)
    if config.normalize_advantages == "step":
        trajectories = _normalized(trajectories)
    return Selection(
        trajectories=tuple(trajectories),
        num_groups=len(groups),
        num_kept_groups=kept,
        num_all_correct=all_correct,
        num_all_incorrect=all_incorrect,
        num_undecided=undecided,
        pass_rate=num_correct / num_decided if num_decided else math.nan,
    )


def _normalized(trajectories: Sequence[Trajectory]) -> list[Trajectory]:
    """Returns the trajectories with advantages of mean 0 and standard deviation 1; of 0 if all are equal."""
    advantages = standardized([trajectory.advantage for trajectory in trajectories], epsilon=0.0)
    return [
        replace(trajectory, advantage=advantage) for trajectory, advantage in zip(trajectories, advantages, strict=True)
    ]


def standardized(values: Sequence[float], *, epsilon: float) -> list[float]:
    """Returns (value - mean) / (population standard deviation + epsilon); 0 where all are equal up to rounding."""
    mean = math.fsum(values) / max(len(values), 1)
    std = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / max(len(values), 1))
    return [(value - mean) / (std + epsilon) if std > _ROUNDING else 0.0 for value in values]


def is_useful(group: Sequence[GradedRollout], config: ObjectiveConfig) -> bool:
    """Returns whether a step trains on responses of the group."""
    return _is_kept(used_responses(group, config), config)


def selects_by_functions(config: ObjectiveConfig) -> bool:
    """Returns whether functions of the user's take part in the selection; they may read texts and tokens."""
    functions = config.functions
    return any(one is not None for one in (functions.advantages, functions.keep_group, functions.choose))


def group_advantages(responses: Sequence[GradedRollout], config: ObjectiveConfig) -> list[float]:
    """Returns the advantage of each used response of a group, by `shaping` or by a function of the user's.

    Raises:
        ValueError: the function returned something else than a finite number for each response.
    """
    own = objective_function(config, "advantages")
    if own is None:
        # The reward model's weights have the direction of the outcome, so advantages must have it too.
        credits = None if config.uses_reward_model else [graded.credit for graded in responses]
        return shaped_rewards([graded.is_correct for graded in responses], config, credits=credits)
    values = [float(value) for value in own(responses=responses)]
    if len(values) != len(responses) or not all(map(math.isfinite, values)):
        prompt = responses[0].rollout.prompt.id
        raise ValueError(
            f"{described(config, 'advantages')} returned {values} for the {len(responses)} responses to {prompt}; "
            "return a finite number for each"
        )
    return values


def shaped_rewards(
    outcomes: Sequence[bool], config: ObjectiveConfig, *, credits: Sequence[float] | None = None
) -> list[float]:
    """Returns the advantage A_i of each decided response of a group.

    The reward r_i goes from the lower value of `reward_values` at credit 0 to the upper one at credit 1. credits: in
    [0, 1]; None: 1 for correct and 0 for incorrect responses.

    rloo   r_i - mean of the others' r
    grpo   (r_i - mean) / (population std + eps)
    paper  +1 for correct, -(1 - p) for incorrect, p the share of correct ones: R* = (1 - p) R under eq. (6), R = -1
    raw    r_i;  positive_one, negative_one: +1, -1 for all
    """
    n = len(outcomes)
    low, high = config.reward_values
    shares = [float(correct) for correct in outcomes] if credits is None else credits
    rewards = [(1.0 - share) * low + share * high for share in shares]
    total = math.fsum(rewards)
    if config.shaping == "rloo":
        return [reward - (total - reward) / (n - 1) for reward in rewards] if n > 1 else [0.0]
    if config.shaping == "grpo":
        return standardized(rewards, epsilon=config.grpo_epsilon)
    if config.shaping == "paper":
        p = sum(outcomes) / n
        return [1.0 if correct else -(1.0 - p) for correct in outcomes]
    if config.shaping == "raw":
        return rewards
    return [1.0 if config.shaping == "positive_one" else -1.0] * n


def used_responses(group: Sequence[GradedRollout], config: ObjectiveConfig) -> list[GradedRollout]:
    """Returns the responses that count in the group's statistics and may train."""
    return list(group) if config.undecided_as_incorrect else decided(group)


def _is_kept(responses: Sequence[GradedRollout], config: ObjectiveConfig) -> bool:
    """Returns whether a group trains. responses: its `used_responses`."""
    outcomes = [graded.is_correct for graded in responses]
    own = objective_function(config, "keep_group")
    if own is not None:
        # A pair needs both outcomes, whatever the function says.
        has_pair = any(outcomes) and not all(outcomes)
        is_paired = config.selection == "pair" and config.functions.choose is None
        return bool(responses) and (has_pair or not is_paired) and bool(own(responses=responses))
    if not outcomes or (config.shaping == "rloo" and len(outcomes) < 2):
        return False
    some_correct, some_incorrect = any(outcomes), not all(outcomes)
    return {
        "mixed": some_correct and some_incorrect,
        "all": True,
        "any_correct": some_correct,
        "any_incorrect": some_incorrect,
    }[config.keep_groups]


def _chosen(candidates: list[Trajectory], config: ObjectiveConfig, rng: random.Random) -> list[Trajectory]:
    own = objective_function(config, "choose")
    if own is not None:
        return _checked_choice(list(own(trajectories=candidates, rng=rng)), candidates, config)
    correct = [trajectory for trajectory in candidates if trajectory.correct]
    incorrect = [trajectory for trajectory in candidates if not trajectory.correct]
    if config.selection == "pair":
        return [rng.choice(correct), rng.choice(incorrect)]
    return {"all": candidates, "correct": correct, "incorrect": incorrect}[config.selection]


def _checked_choice(
    chosen: list[Trajectory], candidates: list[Trajectory], config: ObjectiveConfig
) -> list[Trajectory]:
    """Returns what a user's function chose. Raises ValueError where that is not some of the responses, each once."""
    ids = [trajectory.id if isinstance(trajectory, Trajectory) else repr(trajectory) for trajectory in chosen]
    if len(set(ids)) != len(ids) or not set(ids) <= {item.id for item in candidates}:
        raise ValueError(
            f"{described(config, 'choose')} returned {', '.join(ids)} for the responses to "
            f"{candidates[0].rollout.prompt.id}; return some of its trajectories, each once"
        )
    return chosen
