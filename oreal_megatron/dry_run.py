"""Dry run: two steps of an experiment on CPU, with small model, lengths, data and layout.

Objective, schedules, kinds of parallelism, checkpoints and tracking stay as in the experiment. Every parallel dimension
above 1 becomes 2, and data parallelism uses the rest of at most 8 processes. SGLang servers become at most 2, on CPU,
with the experiment's placement. wandb and the endpoint for Prometheus are off.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from oreal_megatron.compose import with_missing_values
from oreal_megatron.config import ConfigError, parse_sections
from oreal_megatron.overrides import composition_error, config_directory

MAX_PROCESSES = 8
MAX_SERVERS = 2
# Sections that a dry run takes values from.
_READ = ("objective", "rollout", "parallel", "resources")
# Options of conf/ that replace the experiment's: those of the arithmetic demo.
_STAND_INS = {"model": "arithmetic_small", "fp8": "none", "data": "arithmetic", "prompt": "chat", "sft": "arithmetic"}
_SMALL = {
    "run.num_steps": 2,
    "run.checkpoint_every": 1,
    "data.prompts_per_step": 8,
    "data.pass_rate": None,
    "data.difficulty_balance": [],
    "data.arithmetic.num_train": 64,
    "data.arithmetic.num_heldout": 16,
    "data.arithmetic.num_demonstrations": 128,
    # Demonstrations without working and few possible answers: guesses are often right, so groups are useful.
    "data.arithmetic.direct_shares": [1.0, 1.0],
    "data.arithmetic.min_terms": 2,
    "data.arithmetic.max_terms": 4,
    "data.arithmetic.max_operand": 4,
    "data.arithmetic.operators": ["+"],
    "rollout.samples_per_prompt": 4,
    "rollout.batch_size": 32,
    "rollout.sampling.max_new_tokens": 24,
    "sft.steps": 40,
    "sft.optimizer.lr": 1.0e-2,
    "evaluation.every": 1,
    "evaluation.benchmarks": {"arithmetic": {"path": None, "samples": 0, "limit": 8}},
    "parallel.micro_batch_tokens": 256,
    "parallel.fused_weight_gradients": False,
    "tracking.wandb": "disabled",
    "tracking.prometheus_port": None,
}
_SMALL_SERVERS: dict[str, Any] = {
    "device": "cpu",
    "python": None,
    "max_concurrency": 16,
    "memory_share": 0.5,
    "arguments": {"max-total-tokens": 8192, "disable-overlap-schedule": True},
}


def is_dry_run(config: DictConfig) -> bool:
    """Returns whether a composed configuration asks for a dry run."""
    return bool(OmegaConf.select(config, "run.dry_run", default=False))


def shrunk(config: DictConfig) -> DictConfig:
    """Returns the experiment as a dry run, which reads no values of a site but the run's directory.

    Raises:
        ConfigError: a section that the dry run is derived from is not valid.
    """
    _check_sections(config)
    small: Any = OmegaConf.create(OmegaConf.to_container(config, resolve=False))
    OmegaConf.set_struct(small, False)
    for group, option in _STAND_INS.items():
        small[group] = OmegaConf.create(_option(group, option))
    for key, value in _SMALL.items():
        OmegaConf.update(small, key, value, merge=False)
    if small.run.mode == "sft":
        OmegaConf.update(small, "run.num_steps", 0)
        OmegaConf.update(small, "sft.steps", 2)
    for key, (_, value) in layout_mapping(config).items():
        OmegaConf.update(small, key, value)
    if OmegaConf.select(config, "rollout.sglang") is not None:
        for key, value in _SMALL_SERVERS.items():
            OmegaConf.update(small, f"rollout.sglang.{key}", value, merge=False)
    layers = 2 * small.parallel.pipeline * small.parallel.virtual_pipeline
    OmegaConf.update(small, "model.geometry.num_layers", layers)
    if small.objective.actor_freeze_steps:
        # One step with a frozen policy, and one in which it trains.
        small.objective.actor_freeze_steps = 1
    resources = {"device": "cpu", "devices_per_node": MAX_PROCESSES, "trainer_devices": num_processes(config)}
    small.resources = OmegaConf.create(resources)
    # run.dir contains run.name in most experiments, and then changes with it.
    name = OmegaConf.select(config, "run.name")
    OmegaConf.update(small, "run.name", f"dry_run_{name}")
    return small


def _check_sections(config: DictConfig) -> None:
    try:
        raw: Any = {name: OmegaConf.to_container(config[name], resolve=True) for name in _READ if name in config}
    except (OmegaConfBaseException, ValueError) as error:  # ValueError: a section is a plain value
        raise composition_error(error, ()) from error
    # Values of a site are not needed: they are ??? until it gives them.
    violations = [v for v in parse_sections(raw, _READ)[1] if v.key != "resources.trainer_devices" or v.value != "???"]
    if violations:
        raise ConfigError(with_missing_values(violations))


def layout_mapping(config: DictConfig) -> dict[str, tuple[Any, Any]]:
    """Returns the changes of the layout: key -> (value of the experiment, value of the dry run)."""
    parallel: Any = OmegaConf.to_container(config.parallel, resolve=True)
    mapping, processes = {}, 1
    for name in ("tensor", "pipeline", "context", "virtual_pipeline"):
        value = parallel.get(name, 1)
        reduced = min(value, 2)
        if name != "virtual_pipeline":
            processes *= reduced
        if reduced != value:
            mapping[f"parallel.{name}"] = (value, reduced)
    assert processes <= MAX_PROCESSES
    if OmegaConf.select(config, "rollout.sglang") is not None:
        servers: Any = OmegaConf.to_container(config.rollout.sglang, resolve=True)
        for name, most in (("num_servers", MAX_SERVERS), ("tensor", 2)):
            if servers[name] > most:
                mapping[f"rollout.sglang.{name}"] = (servers[name], most)
    if (evaluating := OmegaConf.select(config, "evaluation.servers", default=0)) > MAX_SERVERS - 1:
        mapping["evaluation.servers"] = (evaluating, MAX_SERVERS - 1)
    return mapping


def num_processes(config: DictConfig) -> int:
    """Returns the trainer processes of a dry run: one replica of its layout, or two if the experiment has several."""
    parallel: Any = OmegaConf.to_container(config.parallel, resolve=True)
    replica, whole = 1, 1
    for name in ("tensor", "pipeline", "context"):
        replica *= min(parallel.get(name, 1), 2)
        whole *= parallel.get(name, 1)
    trainers = OmegaConf.select(config, "resources.trainer_devices") or whole
    return 2 * replica if trainers > whole and 2 * replica <= MAX_PROCESSES else replica


def _option(group: str, option: str) -> Any:
    return yaml.safe_load((Path(config_directory()) / group / f"{option}.yaml").read_text())
