"""Graded rollouts of a step as JSON records: written for people, the report and replay, and read again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from oreal_megatron.types import GradedRollout, Trajectory


def to_records(
    groups: Sequence[Sequence[GradedRollout]],
    trained: Sequence[Trajectory] = (),
    token_weights: Mapping[str, Sequence[float]] | None = None,
    scores: Mapping[str, float] | None = None,
    token_texts: Callable[[Sequence[int]], list[str]] | None = None,
) -> list[dict[str, Any]]:
    """Returns one record per rollout.

    trained: trajectories whose advantages are added. token_weights, scores (logits of the reward model): by rollout id.
    token_texts: returns the tokens of a response as text; added where a rollout has token weights.
    """
    advantages = {trajectory.id: trajectory.advantage for trajectory in trained}
    records = []
    for group_index, group in enumerate(groups):
        for graded in group:
            rollout = graded.rollout
            id = rollout.id
            record = {"id": id, "group": group_index, **graded.to_json()}
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
    """Reads the groups of a trajectories file.

    Raises:
        ValueError: a line is not a trajectory record; the message names file and line.
    """
    groups: dict[int, list[GradedRollout]] = {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            record = json.loads(line)
            groups.setdefault(record["group"], []).append(GradedRollout.from_json(record))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}:{number}: not a trajectory record: {error!r}") from error
    return list(groups.values())
