"""The early stop of a step's sampling: when there are enough groups, over all replicas."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from oreal_megatron.distributed.groups import ParallelGroups
from oreal_megatron.types import GradedRollout


@dataclass(frozen=True, kw_only=True)
class EarlyStop:
    """Condition under which sampling ends before all groups are complete, and where unfinished responses are kept."""

    num_groups: int
    """Number of complete groups that count, after which sampling ends."""
    counts: Callable[[Sequence[GradedRollout]], bool]
    """Function that says whether a complete group counts."""
    max_staleness: int
    """Largest number of publications by which the weights of a kept token may be behind when its response goes on."""
    next_batch: str
    """Name of the batch that goes on with the unfinished responses."""


class Tally:
    """Count of the complete groups that count towards an early stop, shared by all replicas."""

    def __init__(self, groups: ParallelGroups, early_stop: EarlyStop):
        self._groups, self._early_stop = groups, early_stop
        self._name = f"early_stop/{groups.from_main(uuid.uuid4().hex)}"

    def add(self, units: Iterable[Sequence[GradedRollout]]) -> None:
        """Counts the groups of graded units, each of whole groups."""
        useful = 0
        for unit in units:
            by_prompt: dict[str, list[GradedRollout]] = {}
            for graded in unit:
                by_prompt.setdefault(graded.rollout.prompt.id, []).append(graded)
            useful += sum(self._early_stop.counts(group) for group in by_prompt.values())
        self._groups.count(self._name, useful)

    def is_enough(self) -> bool:
        """Returns whether sampling may end."""
        return self._groups.count(self._name) >= self._early_stop.num_groups
