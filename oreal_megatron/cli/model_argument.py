"""The argument MODEL of commands that generate with a model and train nothing: their settings, and the opened model."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from oreal_megatron.compose import composed
from oreal_megatron.config import TrainConfig
from oreal_megatron.distributed.environment import NCCL_WITHOUT_CUMEM, devices_hidden
from oreal_megatron.log import quiet_libraries
from oreal_megatron.stopping import StopRequest

if TYPE_CHECKING:
    from oreal_megatron.rollout.sampler import Sampler
    from oreal_megatron.workspace import Workspace

_DEFAULTS = {"experiment": "own_model", "evaluation": "none"}
"""Options of groups where no override names another."""
_FIXED: dict[str, Any] = {
    "run.num_steps": 0,
    "run.mode": "train",
    "run.replay_dir": None,
    "run.export": "none",
    "data.train": None,
    "data.pass_rate": None,
    "data.difficulty_balance": [],
    "data.curriculum": None,
    "sft": None,
    "fp8.policy": None,
    "fp8.reward_model": None,
    "fp8.reference": None,
    "model.reward_model": None,
    "rollout.long_tail": None,
    "rollout.schedule": "in_turn",
    "rollout.max_staleness": None,
    "tracking.tensorboard": False,
    "tracking.wandb": "disabled",
    "tracking.prometheus_port": None,
    "tracking.report": False,
}
"""Keys of what trains, or reports on training, with the values that switch it off."""


def model_settings(arguments: argparse.Namespace, *, command: str, directory: str) -> DictConfig:
    """Returns the composed settings of a command: those of its overrides, with MODEL and with nothing that trains.

    arguments: with model, overrides and config_dir. command: name of the command, for messages. directory: run.dir
    where no override sets it.

    Raises:
        ConfigError: an override names an unknown group, option or key, or cannot be read.
        ValueError: MODEL is no Hugging Face directory, or an override sets what the command fixes.
    """
    _check_model(Path(arguments.model))
    given = [override.partition("=")[0].lstrip("+~") for override in arguments.overrides]
    for key, override in zip(given, arguments.overrides, strict=True):
        if any(f"{key}.".startswith(f"{fixed}.") for fixed in ("model.path", *_FIXED)):
            raise ValueError(f"{override}: {command} takes MODEL and trains nothing. Remove this override")
    defaults = [f"{group}={option}" for group, option in _DEFAULTS.items() if group not in given]
    raw = composed([*defaults, *arguments.overrides], config_dir=arguments.config_dir)
    own = {"model.path": arguments.model}
    if "run.name" not in given:
        own["run.name"] = _name_of(Path(arguments.model).resolve())
    if "run.dir" not in given:
        own["run.dir"] = directory
    for key, value in (own | _FIXED).items():
        OmegaConf.update(raw, key, value, merge=False)
    return raw


@contextlib.contextmanager
def opened_model(config: TrainConfig) -> Iterator[tuple[Workspace, Sampler, str]]:
    """Opens the run's directory and the model of model.path. Gives workspace, sampler and the digest of the weights.

    Every rank calls it, before torch is imported.

    Raises:
        ValueError: model.path cannot be read; a server does not fit the policy.
        Stopped: a signal asked for it.
    """
    os.environ.setdefault(*NCCL_WITHOUT_CUMEM)
    quiet_libraries()
    with devices_hidden(when=config.resources.device == "cpu"):
        # Imported here because they import torch, which --help should not wait for.
        from oreal_megatron.builder import build_evaluation
        from oreal_megatron.initial_policy import weights_fingerprint
        from oreal_megatron.workspace import opened_workspace

        stop = StopRequest()
        with stop.on_signals(), opened_workspace(config, stop) as workspace:
            groups, path = workspace.groups, Path(str(config.model.path))
            weights = groups.from_main(weights_fingerprint(path) if groups.is_main else "")
            sampler, generating = build_evaluation(workspace)
            with generating:
                yield workspace, sampler, weights


def _name_of(model: Path) -> str:
    """Returns the name of a model's directory; of an export, RUN/huggingface/STEP/policy, run and step."""
    run, exports, step, name = ("", "", "", *model.parts)[-4:]
    return f"{run}_{step}" if (exports, name) == ("huggingface", "policy") else name


def _check_model(path: Path) -> None:
    """Raises ValueError for what is no Hugging Face directory; for a run, it says where or how its model is one."""
    if (path / "config.json").is_file():
        return
    if not path.is_dir():
        raise ValueError(f"{path}: there is no such directory. Name a Hugging Face directory")
    exports = sorted(path.glob("huggingface/*/policy"))
    if exports:
        raise ValueError(f"{path} is the directory of a run. Name its model, {exports[0]}")
    raise ValueError(
        f"{path}: there is no config.json, so it is no Hugging Face directory. For the checkpoint of a run, make one: "
        "oreal-convert to-hf RUN/checkpoints/step_NNNNNN DIR --model policy --like RUN/huggingface/assets"
    )
