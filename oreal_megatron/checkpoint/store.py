"""Checkpoints in Megatron-Core's distributed format, one directory each, whole or not there at all."""

from __future__ import annotations

import json
import math
import os
import queue
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.api import CheckpointException

from oreal_megatron.files import write_atomically
from oreal_megatron.parallel.groups import ParallelGroups

_STEP = re.compile(r"step_(\d{6})")
INITIAL = "initial"
"""Name of the checkpoint of the initial policy, which is the reference too."""


class CheckpointStore:
    """The checkpoints/ directory of a run."""

    def __init__(self, directory: Path, groups: ParallelGroups, *, keep: int):
        """keep: the newest so many steps stay; the best one and the initial policy stay besides."""
        self.directory = directory
        self._groups = groups
        self._keep = keep

    def save(self, name: str, sharded_state: dict[str, Any]) -> None:
        """Writes beside the target and renames, so that a name always means a whole checkpoint.

        Raises:
            OSError: the disk refused; what was there before is untouched.
        """
        target, partial = self.directory / name, self.directory / f"{name}.partial"
        if self._groups.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self._groups.barrier()
        # A queue of this process in place of one behind a spawned manager, which would import __main__ anew and
        # take seconds: the synchronous save reads it in the process that fills it.
        filesystem_async._results_queue = queue.Queue()
        dist_checkpointing.save(
            sharded_state, str(partial), TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
        )
        self._groups.barrier()
        if self._groups.is_main:
            replaced = self.directory / f"{name}.replaced"
            if target.exists():
                os.replace(target, replaced)
            os.replace(partial, target)
            shutil.rmtree(replaced, ignore_errors=True)
        self._groups.barrier()

    def load(self, name: str, sharded_state: dict[str, Any]) -> dict[str, Any]:
        """Fills `sharded_state` (whose tensors say what this rank needs) from a checkpoint.

        Raises:
            ValueError: the checkpoint holds another model, or cannot be read.
        """
        path = self.directory / name
        try:
            return dist_checkpointing.load(sharded_state, str(path))
        except (CheckpointingException, CheckpointException, KeyError, OSError, RuntimeError) as error:
            raise ValueError(f"checkpoint {path} does not fit this run's model, or is damaged: {error}") from error

    def has(self, name: str) -> bool:
        """Whether there is such a checkpoint; every rank gets the main rank's answer."""
        return self._groups.from_main(self._is_whole(name))

    @property
    def steps(self) -> list[int]:
        """Steps that have a checkpoint, oldest first; every rank gets the main rank's answer."""
        names = [path.name for path in self.directory.glob("step_*") if self._is_whole(path.name)]
        return self._groups.from_main(sorted(int(match[1]) for name in names if (match := _STEP.fullmatch(name))))

    @property
    def best(self) -> dict[str, Any] | None:
        """`{"step": ..., "score": ..., "checkpoint": ...}` of the best evaluation; the main rank's answer."""
        path = self.directory / "best.json"
        return self._groups.from_main(json.loads(path.read_text()) if path.is_file() else None)

    def is_best(self, score: float) -> bool:
        """Whether no remembered score is as good; never for one that is not a number."""
        best = self.best
        return math.isfinite(score) and (best is None or score > best["score"])

    def _is_whole(self, name: str) -> bool:
        return (self.directory / name / "metadata.json").is_file()

    def remember_best(self, step: int, score: float) -> None:
        """Notes a checkpoint that is there already (after 0 steps: the initial policy) as the best one."""
        if self._groups.is_main:
            name = step_name(step) if step else INITIAL
            write_atomically(
                self.directory / "best.json", json.dumps({"step": step, "score": score, "checkpoint": name})
            )
        self._groups.barrier()
        self.retain()

    def retain(self) -> None:
        """Removes step checkpoints that are neither among the newest nor the best."""
        best, steps = self.best, self.steps
        if self._groups.is_main:
            for step in steps[: -self._keep]:
                if best is None or step != best["step"]:
                    # The metadata first: what is left of a killed removal is no checkpoint to anyone.
                    (self.directory / step_name(step) / "metadata.json").unlink()
                    shutil.rmtree(self.directory / step_name(step))
        self._groups.barrier()


def step_name(step: int) -> str:
    return f"step_{step:06d}"


def trained_state(prefix: str, trained: Any, *, is_loading: bool = False) -> dict[str, Any]:
    """The sharded state of a models.TrainedModel under `prefix`: weights, optimizer, schedule."""
    model = trained.module.sharded_state_dict(prefix=f"{prefix}.")
    return {
        f"{prefix}.model": model,
        f"{prefix}.optimizer": trained.optimizer.sharded_state_dict(model, is_loading=is_loading),
        f"{prefix}.schedule": trained.schedule.state_dict(),
    }


def load_trained(prefix: str, trained: Any, state: dict[str, Any]) -> None:
    """The inverse of `trained_state`."""
    trained.module.load_state_dict({key.removeprefix(f"{prefix}."): v for key, v in state[f"{prefix}.model"].items()})
    trained.load_optimizer(state[f"{prefix}.optimizer"])
    trained.schedule.load_state_dict(state[f"{prefix}.schedule"])


def weights_only(prefix: str, module: Any, *, without: Callable[[str], bool] = lambda key: False) -> dict[str, Any]:
    """The sharded state of a module's weights, keys that `without` names left out."""
    state = module.sharded_state_dict(prefix=f"{prefix}.")
    return {key: value for key, value in state.items() if not without(key)}
