"""A step's graded rollouts as JSON records, and back: for people, for the report and for replay."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from oreal_megatron.records import FinishReason, Grade, GradedRollout, Prompt, Rollout, Trajectory, Verdict


def to_records(
    groups: Sequence[Sequence[GradedRollout]],
    trained: Sequence[Trajectory] = (),
    token_weights: Mapping[str, Sequence[float]] | None = None,
    scores: Mapping[str, float] | None = None,
    token_texts: Callable[[Sequence[int]], list[str]] | None = None,
) -> list[dict[str, Any]]:
    """One record a rollout.

    `trained` ones carry their advantage; token weights (with the tokens as text) and reward model logits are
    looked up by rollout id.
    """
    advantages = {trajectory.id: trajectory.advantage for trajectory in trained}
    records = []
    for group_index, group in enumerate(groups):
        for graded in group:
            rollout = graded.rollout
            id = rollout.id
            record = {"id": id, "group": group_index, **asdict(rollout), "grade": asdict(graded.grade)}
            if id in advantages:
                record["advantage"] = advantages[id]
            if token_weights and id in token_weights:
                record["token_weights"] = [round(weight, 4) for weight in token_weights[id]]
                if token_texts is not None:
                    record["token_texts"] = token_texts(rollout.response_ids)
            if scores and id in scores:
                record["reward_model_logit"] = scores[id]
            records.append(record)
    return records


def read_groups(path: Path) -> list[list[GradedRollout]]:
    """The groups of one trajectories file.

    Raises:
        ValueError: a line is not such a record (file and line are named).
    """
    groups: dict[int, list[GradedRollout]] = {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            record = json.loads(line)
            graded = GradedRollout(rollout=_rollout(record), grade=_grade(record["grade"]))
            groups.setdefault(record["group"], []).append(graded)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}:{number}: not a trajectory record: {error!r}") from error
    return list(groups.values())


def _rollout(record: dict[str, Any]) -> Rollout:
    return Rollout(
        prompt=Prompt(**record["prompt"]),
        sample_index=record["sample_index"],
        prompt_ids=tuple(record["prompt_ids"]),
        response_ids=tuple(record["response_ids"]),
        logprobs=tuple(record["logprobs"]),
        text=record["text"],
        finish_reason=FinishReason(record["finish_reason"]),
        weight_version=record["weight_version"],
    )


def _grade(record: dict[str, Any]) -> Grade:
    return Grade(**{**record, "verdict": Verdict(record["verdict"])})
