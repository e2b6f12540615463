"""Journal of graded rollouts: a step that is repeated after a kill does not generate them again.

A unit is a set of requests that the engine generates together (`RolloutEngine.units`). Its line is on the disk before
the next unit starts, under a key of everything that its rollouts depend on within a run; the directory's config.yaml
says which run that is. Every model replica appends to its own file, <batch name>.replica_<data rank>.jsonl. Unfinished
responses that a later batch goes on with are in <batch name>.begun.jsonl. An empty <batch name>.undecided.jsonl says
that the run ended because too many of the batch's responses were UNDECIDED.
"""

from __future__ import annotations

import glob
import hashlib
import json
import re
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import orjson

from oreal_megatron.config import SamplingConfig
from oreal_megatron.distributed.groups import ParallelGroups
from oreal_megatron.files import append_line, json_line, open_log, whole_lines, write_parts_atomically
from oreal_megatron.types import Completion, GenerationRequest, GradedRollout, Prompt

_OF_STEP = re.compile(r"[a-z]+_(\d{6})\.(replica_\d+|begun|undecided)\.jsonl")

PartialResponses = Mapping[tuple[str, int], Completion]
"""Responses, finished or not, of groups that are not complete; by prompt id and sample index."""


class RolloutJournal:
    """The journal/ directory of a run. Several threads may append."""

    def __init__(self, directory: Path, groups: ParallelGroups):
        self.directory = directory
        self._groups = groups
        self._open: tuple[str, IO[bytes]] | None = None
        self._lock = threading.RLock()
        """Held while `_open` is used."""

    def read(self, batch_name: str) -> dict[str, list[GradedRollout]]:
        """Returns the units journalled for a batch (`step_000003`) by key; empty on all ranks but the main rank.

        Damaged and half-written lines are left out. Of a unit that was generated again because it was too old, the one
        whose oldest token is newest is returned.
        """
        units: dict[str, list[GradedRollout]] = {}
        if not self._groups.is_main:
            return units
        for path in sorted(self.directory.glob(f"{glob.escape(batch_name)}.replica_*.jsonl")):
            for line in whole_lines(path):
                try:
                    record = orjson.loads(line)
                    unit = [GradedRollout.from_json(item) for item in record["rollouts"]]
                    key = record["unit"]
                except (KeyError, TypeError, ValueError):
                    continue
                if key not in units or _oldest(unit) >= _oldest(units[key]):
                    units[key] = unit
        return units

    def append(self, batch_name: str, unit: str, rollouts: Sequence[GradedRollout]) -> None:
        """Journals a unit of this replica; on return it is on the disk. Called by the replica's leading process.

        Raises:
            OSError: the disk refused; the unit is not journalled.
        """
        record = {"unit": unit, "rollouts": [graded.to_json() for graded in rollouts]}
        with self._lock:
            if self._open is None or self._open[0] != batch_name:
                self.close()
                path = self.directory / f"{batch_name}.replica_{self._groups.data_rank}.jsonl"
                self._open = batch_name, open_log(path)
            append_line(self._open[1], json_line(record))

    def keep_partial(self, batch_name: str, partial: PartialResponses) -> None:
        """Keeps responses for a batch to go on with, replacing earlier ones. Called by the main process.

        Raises:
            OSError: the disk refused.
        """
        lines = (
            json_line({"prompt": prompt, "sample": sample, "completion": completion.to_json()})
            for (prompt, sample), completion in partial.items()
        )
        write_parts_atomically(self.directory / f"{batch_name}.begun.jsonl", lines)

    def partial(self, batch_name: str) -> dict[tuple[str, int], Completion]:
        """Returns the responses kept for a batch, without damaged lines; empty on all ranks but the main rank."""
        kept: dict[tuple[str, int], Completion] = {}
        for line in whole_lines(self.directory / f"{batch_name}.begun.jsonl") if self._groups.is_main else ():
            try:
                record = orjson.loads(line)
                kept[record["prompt"], record["sample"]] = Completion.from_json(record["completion"])
            except (KeyError, TypeError, ValueError):
                continue
        return kept

    def grade_again(self, batch_name: str) -> None:
        """Has the batch's UNDECIDED responses graded again when it is read. Every rank may call it.

        Raises:
            OSError: the disk refused.
        """
        if self._groups.is_main:
            self._undecided(batch_name).touch()

    def is_graded_again(self, batch_name: str) -> bool:
        """Returns whether `grade_again` was called for the batch, in this process or an earlier one."""
        return self._undecided(batch_name).exists()

    def _undecided(self, batch_name: str) -> Path:
        return self.directory / f"{batch_name}.undecided.jsonl"

    def drop(self, *, before_step: int) -> None:
        """Removes the files of earlier steps, to which no checkpoint leads back."""
        if self._groups.is_main:
            for path in self.directory.glob("*.jsonl"):
                if (match := _OF_STEP.fullmatch(path.name)) and int(match[1]) < before_step:
                    path.unlink()

    def forget(self, batch_name: str) -> None:
        """Removes the units of batches whose outcome is saved elsewhere. batch_name: may be a glob pattern."""
        self.close()
        if self._groups.is_main:
            for kind in ("replica_*", "undecided"):
                for path in self.directory.glob(f"{batch_name}.{kind}.jsonl"):
                    path.unlink()

    def close(self) -> None:
        """Closes the file that is open for appending."""
        with self._lock:
            if self._open is not None:
                self._open[1].close()
                self._open = None


def _oldest(unit: Sequence[GradedRollout]) -> float:
    """Returns the oldest weight version of a unit's tokens; infinity without tokens."""
    return min((span.version for graded in unit for span in graded.rollout.weight_spans), default=float("inf"))


def unit_key(
    prompts: Sequence[Prompt],
    requests: Sequence[GenerationRequest],
    sampling: SamplingConfig,
    weight_version: int | None,
) -> str:
    """Returns a digest of everything that a unit's graded rollouts depend on.

    prompts: the prompt of each request. Weights are named by their version: a run's directory takes one configuration
    and one data set only, so a version is one set of weights (up to rounding, where the layout changed), as long as the
    steps before it train the same rollouts. weight_version: None where several versions may generate the unit; the
    spans of its responses then name them. Which weights these are depends on when the responses were generated, so a
    unit of a later step stays exact only where the steps between, which the journal has, are repeated as they were.
    """
    content: list[Any] = [
        weight_version,
        # What a function of the user's own returned is in the requests.
        sampling.model_dump(mode="json", exclude={"function"}),
        [
            (prompt.id, prompt.question, prompt.gold_answer, request.prompt_ids, request.seed, request.max_new_tokens)
            for prompt, request in zip(prompts, requests, strict=True)
        ],
        [request.partial.to_json() for request in requests if request.partial is not None],
    ]
    if any(request.stop_token_ids for request in requests):
        content.append([request.stop_token_ids for request in requests])
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()
