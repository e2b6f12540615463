"""What a configuration asks of the processes, the machine and the model directory that it meets."""

from __future__ import annotations

import os
from pathlib import Path

from oreal_megatron.config import ConfigError, GeometryConfig, ModelConfig, SGLangConfig, TrainConfig, Violation
from oreal_megatron.conversion.huggingface import geometry_of


def check_startable(config: TrainConfig, num_processes: int) -> None:
    """Raises ConfigError where the configuration is for another number of processes, or another machine."""
    violations = []
    if (servers := config.rollout.sglang) is not None and not servers.urls and servers.device == "cuda":
        first, devices = first_server_device(servers), config.resources.devices_per_node
        if first + servers.num_servers * servers.tensor > devices:
            remedy = (
                f"servers of {servers.tensor} devices are launched on the main process's machine, which has {devices} "
                f"from number {first} on: start them elsewhere and give rollout.sglang.urls"
            )
            violations.append(Violation("rollout.sglang.num_servers", servers.num_servers, remedy))
    wanted = config.resources.trainer_devices
    if wanted is not None and wanted != num_processes:
        remedy = f"{num_processes} were started; start as many as this, or resources.trainer_devices={num_processes}"
        violations.append(Violation("resources.trainer_devices", wanted, remedy))
    if violations:
        raise ConfigError(violations)


def first_server_device(servers: SGLangConfig) -> int:
    """The number, on this machine, of the first device of launched servers: on the trainer's, or behind them."""
    return 0 if servers.shares_devices else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def geometry_of_run(model: ModelConfig) -> GeometryConfig:
    """model.geometry, or that of model.path, which must then have the sizes that model.geometry names, if it does.

    Raises:
        ConfigError: with every size that differs.
        ValueError: the directory cannot be read.
    """
    if model.path is None:
        assert model.geometry is not None
        return model.geometry
    found = geometry_of(Path(model.path))
    if (expected := model.geometry) is not None:
        # Sizes are what plans are made of; the numerics (rotary base, epsilon) are the directory's own.
        sizes = (
            "num_layers",
            "hidden_size",
            "ffn_hidden_size",
            "num_attention_heads",
            "num_query_groups",
            "vocab_size",
        )
        violations = [
            Violation(f"model.geometry.{name}", getattr(expected, name), f"{model.path} has {getattr(found, name)}")
            for name in sizes
            if getattr(expected, name) not in (None, getattr(found, name))
        ]
        if violations:
            raise ConfigError(violations)
    return found
