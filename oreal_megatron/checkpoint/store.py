"""Store of a run's checkpoints: a directory per checkpoint, whole or not there at all.

A checkpoint is written under another name and renamed once its manifest is there, so every named checkpoint is whole.
The manifest shows damage before anything is loaded.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper
from torch.distributed.checkpoint.api import CheckpointException

from oreal_megatron.checkpoint.manifest import damages, read_manifest
from oreal_megatron.checkpoint.writer import CheckpointWriter
from oreal_megatron.distributed.groups import ParallelGroups
from oreal_megatron.files import sync, write_atomically

logger = logging.getLogger(__name__)

_STEP = re.compile(r"step_(\d{6})")
INITIAL = "initial"
"""Name of the checkpoint of the initial policy, which is also the reference."""


@dataclass(frozen=True, kw_only=True)
class Best:
    """The best evaluation so far."""

    step: int
    score: float

    @property
    def checkpoint(self) -> str:
        """Name of the checkpoint; the best after 0 steps is the initial policy."""
        return step_name(self.step) if self.step else INITIAL


class CheckpointStore:
    """The checkpoints/ directory of a run. Every method is called by all ranks, and returns the same on all."""

    def __init__(
        self,
        directory: Path,
        groups: ParallelGroups,
        *,
        keep: int,
        on_saved: Callable[[int], None] = lambda oldest_step: None,
    ):
        """Opens the store, and removes what a killed process left half-written.

        keep: number of newest steps that are kept, with the best step as of each of them, and the step whose evaluation
        was under way; the initial policy is always kept. on_saved: called once a step's checkpoint is whole, with the
        oldest of the newest `keep` steps and of the steps whose evaluations were under way.
        """
        self.directory = directory
        self._groups = groups
        self._keep = keep
        self._on_saved = on_saved
        self._writer = CheckpointWriter(groups)
        self._verified: set[str] = set()
        self._saving = ""
        if groups.is_main:
            self._clean()
        groups.barrier()

    def save(
        self,
        name: str,
        sharded_state: dict[str, Any],
        *,
        best: Best | None = None,
        pending_evaluation: int | None = None,
        wait: bool = True,
        made_from: Mapping[str, Any] | None = None,
    ) -> None:
        """Saves a checkpoint under a name that is not there yet.

        best: the best evaluation as of this step; best.json names it once this checkpoint is whole. pending_evaluation:
        the step whose evaluation is under way; its checkpoint is kept as long as this one. wait: False returns once the
        state has been copied; the checkpoint becomes whole in a later `finish`. made_from: settings that the
        checkpoint depends on, kept in its manifest.

        Raises:
            OSError: the disk refused; whole checkpoints are untouched.
        """
        self.finish(wait=True)
        # The name is unique: a writer that outlives a killed trainer does not write into this directory.
        partial = self._groups.from_main(self.directory / f"{name}.partial-{uuid.uuid4().hex[:8]}")
        self._saving = name
        with self._explained(f"checkpoint {name}"):
            if self._groups.is_main:
                partial.mkdir(parents=True)
            self._groups.barrier()
            notes = {} if made_from is None else {"made_from": made_from}
            named = {"best": asdict(best) if best else None, "pending_evaluation": pending_evaluation}
            self._writer.start(partial, sharded_state, **named, **notes)
        self.finish(wait=wait)

    @property
    def is_busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._writer.is_busy

    def finish(self, *, wait: bool) -> None:
        """Completes a save that was not waited for, if it is written; with `wait`, waits until it is written.

        Raises:
            OSError: the disk refused; whole checkpoints are untouched.
        """
        if not self._writer.is_busy:
            return
        with self._explained(f"checkpoint {self._saving}"):
            partial = self._writer.finish(wait=wait)
            if partial is None:
                return
            name = self._saving
            if self._groups.is_main:
                os.replace(partial, self.directory / name)
                sync(self.directory)
            self._groups.barrier()
        self._verified.add(name)
        if _STEP.fullmatch(name):
            manifest = read_manifest(self.directory / name) if self._groups.is_main else None
            best = self._groups.from_main(manifest["best"] if manifest else None)
            self.remember_best(Best(**best) if best else None)
            kept = self.steps[-self._keep :]
            pending = self._pending_evaluations(kept) if self._groups.is_main else set()
            self._on_saved(min({kept[0], *(self._groups.from_main(pending) or ())}))

    def load(self, name: str, sharded_state: dict[str, Any]) -> dict[str, Any]:
        """Loads the tensors that `sharded_state` describes, the parts of this rank, from a checkpoint of any layout.

        Raises:
            ValueError: the checkpoint is damaged, or holds another model.
        """
        return load_checkpoint(self.directory / name, sharded_state, self._groups, found=self.damages(name))

    def has(self, name: str) -> bool:
        """Returns whether there is a checkpoint of this name, damaged or not."""
        return self._groups.from_main((self.directory / name).is_dir())

    def damages(self, name: str) -> list[str]:
        """Lists the damages of a checkpoint; empty where it is whole. The ranks share the reading."""
        if name in self._verified:
            return []
        found = damages_of(self.directory / name, self._groups)
        if not found:
            self._verified.add(name)
        return found

    @property
    def steps(self) -> list[int]:
        """Steps that have a checkpoint, damaged or not, in ascending order."""
        matches = (_STEP.fullmatch(path.name) for path in self.directory.glob("step_*"))
        return self._groups.from_main(sorted(int(match[1]) for match in matches if match))

    def newest_whole(self) -> int | None:
        """Returns the step of the newest whole checkpoint, None without checkpoints; newer, damaged ones are set aside.

        Raises:
            ValueError: all checkpoints are damaged.
        """
        steps = self.steps
        while steps:
            name = step_name(steps[-1])
            if not (found := self.damages(name)):
                return steps[-1]
            if len(steps) == 1:
                raise ValueError(
                    f"checkpoint {self.directory / name} is damaged ({'; '.join(found)}), and there is none before it; "
                    "restore it from a copy, or remove it to start from the initial policy"
                )
            logger.error("checkpoint %s is damaged: %s; set aside as %s.damaged", name, "; ".join(found), name)
            if self._groups.is_main:
                shutil.rmtree(self.directory / f"{name}.damaged", ignore_errors=True)
                os.replace(self.directory / name, self.directory / f"{name}.damaged")
            self._groups.barrier()
            steps.pop()
        return None

    def remember_best(self, best: Best | None) -> None:
        """Writes best.json for a checkpoint that is there, and removes checkpoints that are not to be kept."""
        if self._groups.is_main:
            path = self.directory / "best.json"
            if best is None:
                path.unlink(missing_ok=True)
            else:
                write_atomically(path, json.dumps({**asdict(best), "checkpoint": best.checkpoint}))
            self._retain(best)
        self._groups.barrier()

    def _pending_evaluations(self, steps: Iterable[int]) -> set[int]:
        """Returns the steps whose evaluations were under way when the checkpoints of `steps` were saved."""
        manifests = [read_manifest(self.directory / step_name(step)) or {} for step in steps]
        return {step for manifest in manifests if (step := manifest.get("pending_evaluation")) is not None}

    def _retain(self, best: Best | None) -> None:
        steps = sorted(int(match[1]) for path in self.directory.iterdir() if (match := _STEP.fullmatch(path.name)))
        kept = set(steps[-self._keep :])
        bests = [best] if best else []
        for step in list(kept):
            manifest = read_manifest(self.directory / step_name(step))
            if manifest and manifest["best"]:
                bests.append(Best(**manifest["best"]))
        for step in set(steps) - kept - {item.step for item in bests} - self._pending_evaluations(kept):
            # Renamed first: the rest of a removal that is killed is not taken for a checkpoint.
            removed = self.directory / f"{step_name(step)}.removed"
            os.replace(self.directory / step_name(step), removed)
            shutil.rmtree(removed)
        for path in self.directory.glob("step_*.damaged"):
            if path.with_suffix("").is_dir():  # written again since
                shutil.rmtree(path)

    def _clean(self) -> None:
        for path in sorted(self.directory.glob("*.partial-*")):
            logger.warning("checkpoint %s was never finished: removed", path.name)
            shutil.rmtree(path, ignore_errors=True)
        for path in self.directory.glob("*.removed"):
            shutil.rmtree(path, ignore_errors=True)

    @contextlib.contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        """Adds to an error of the disk which checkpoints are safe, and removes the half-written checkpoint."""
        try:
            yield
        except OSError as error:
            if self._groups.is_main:
                for path in self.directory.glob("*.partial-*"):
                    shutil.rmtree(path, ignore_errors=True)
            raise OSError(
                f"{name} cannot be written to {self.directory}: {error} "
                f"({shutil.disk_usage(self.directory).free / 2**20:.1f} MiB are free, the unfinished one was removed). "
                "Earlier checkpoints are whole: make room, and run the same command again"
            ) from error


def damages_of(path: Path, groups: ParallelGroups) -> list[str]:
    """Lists the damages of a checkpoint directory; empty where it is whole. The ranks share the reading."""
    parts = groups.gather_over_world(damages(path, part=groups.rank, of=groups.world_size))
    return sorted({text for part in parts for text in part})


def load_checkpoint(
    path: Path, sharded_state: dict[str, Any], groups: ParallelGroups, *, found: list[str]
) -> dict[str, Any]:
    """Loads a checkpoint directory; see CheckpointStore.load. found: its damages.

    Of the tensors that several data-parallel ranks need, each is read by one of them, which sends it to the others.
    """
    if found:
        raise ValueError(f"checkpoint {path} is damaged: {'; '.join(found)}")
    try:
        strategy = FullyParallelLoadStrategyWrapper(
            get_default_load_sharded_strategy(str(path)), groups.collection.dp_cp
        )
        return dist_checkpointing.load(sharded_state, str(path), strategy)
    except (CheckpointingException, CheckpointException, KeyError, OSError, RuntimeError) as error:
        raise ValueError(f"checkpoint {path} does not fit this run's model: {error}") from error


def step_name(step: int) -> str:
    """Returns the name of a step's checkpoint and of its batch of rollouts."""
    return f"step_{step:06d}"


def is_better(score: float, best: Best | None) -> bool:
    """Returns whether a score is a finite number above the best score so far."""
    return math.isfinite(score) and (best is None or score > best.score)
