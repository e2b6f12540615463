"""Graded rollouts of a step as JSON records: written for people, the report and replay, and read again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from oreal_megatron.types import GradedRollout, Trajectory


def to_records(
    groups: Sequence[Sequence[GradedRollout]],
    trained: Sequence[Trajectory] = (),
    token_weights: Mapping[str, np.ndarray] | None = None,
    token_scores: Mapping[str, np.ndarray] | None = None,
    scores: Mapping[str, float] | None = None,
    token_texts: Callable[[Sequence[int]], list[str]] | None = None,
) -> Iterator[dict[str, Any]]:
    """Yields a record for each rollout, to be written by `files.json_line`.

    trained: trajectories whose advantages are added. token_weights and token_scores (fp32, of the policy's tokens),
    scores (logits of the reward model): by rollout id. token_texts: returns tokens as text; added where a rollout has
    token weights.
    """
    advantages = {trajectory.id: trajectory.advantage for trajectory in trained}
    for group_index, group in enumerate(groups):
        for graded in group:
            rollout = graded.rollout
            id = rollout.id
            record = {"id": id, "group": group_index, **graded.to_json()}
            if id in advantages:
                record["advantage"] = advantages[id]
            if token_weights and id in token_weights:
                record["token_weights"] = token_weights[id].round(4)
                if token_texts is not None:
                    mask = rollout.policy_mask
                    ids = rollout.response_ids if mask is None else rollout.response_ids[mask]
                    record["token_texts"] = token_texts(ids.tolist())
            if token_scores and id in token_scores:
                record["token_scores"] = token_scores[id].round(4)
            if scores and id in scores:
                record["reward_model_logit"] = scores[id]
            yield record


def read_groups(path: Path) -> list[list[GradedRollout]]:
    """Reads the groups of a trajectories file.

    Raises:
        ValueError: a line is not a trajectory record; the message names file and line.
    """
    groups: dict[int, list[GradedRollout]] = {}
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                record = orjson.loads(line)
                groups.setdefault(record["group"], []).append(GradedRollout.from_json(record))
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}:{number}: not a trajectory record: {error!r}") from error
    return list(groups.values())
