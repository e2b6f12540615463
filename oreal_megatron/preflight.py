"""Checks of a configuration against the started processes, the machine and the model directory."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from urllib.parse import urlsplit

from oreal_megatron.config import ConfigError, GeometryConfig, ModelConfig, SGLangConfig, TrainConfig, Violation
from oreal_megatron.conversion.huggingface import geometry_of, max_positions, read_model
from oreal_megatron.distributed.addresses import is_this_machine
from oreal_megatron.extensions import check_functions
from oreal_megatron.servers.server_process import installation_problem, interpreter_problem
from oreal_megatron.weight_sync.ipc import collector

logger = logging.getLogger(__name__)


def check_startable(config: TrainConfig, num_processes: int) -> None:
    """Raises ConfigError where the configuration asks for processes, devices, servers or paths that are not there."""
    violations = []
    if (servers := config.rollout.sglang) is not None and not servers.urls and servers.device == "cuda":
        first, devices = first_server_device(servers), config.resources.devices_per_node
        if first + servers.num_servers * servers.tensor > devices:
            remedy = (
                f"Servers of {servers.tensor} device(s) each, from device {first} on, exceed the {devices} devices of "
                "the main process's machine. Start them elsewhere and name them in rollout.sglang.urls."
            )
            violations.append(Violation("rollout.sglang.num_servers", servers.num_servers, remedy))
    launched = None if servers is None or servers.urls or not config.generates else servers
    if launched is not None and launched.device == "cuda" and config.resources.device == "cpu":
        remedy = "resources.device=cpu hides GPUs from the run. Set rollout=sglang_cpu, or resources, such as h100."
        violations.append(Violation("rollout.sglang.device", "cuda", remedy))
    if launched is not None and launched.python is not None:
        if (problem := interpreter_problem(launched.python)) is not None:
            violations.append(Violation("rollout.sglang.python", launched.python, problem))
    elif launched is not None and (problem := installation_problem(launched)) is not None:
        violations.append(Violation("rollout.backend", "sglang", f"{problem}, or set rollout=embedded."))
    wanted = config.resources.trainer_devices
    if wanted is not None and wanted != num_processes:
        remedy = f"{num_processes} were started. Start {wanted}, or set resources.trainer_devices={num_processes}."
        violations.append(Violation("resources.trainer_devices", wanted, remedy))
    violations += _servers_elsewhere(config, num_processes)
    violations += _missing_paths(config)
    violations += check_functions(config)
    if violations:
        raise ConfigError(violations)


def warn_of_uncorrected_tokens(config: TrainConfig) -> None:
    """Warns where tokens of older weights train, and nothing in the objective corrects for them.

    A loss function of the user's gets the rollout's log-probabilities, so it is taken to correct for them itself.
    """
    rollout, objective = config.rollout, config.objective
    causes = []
    if rollout.schedule != "in_turn":
        causes.append(f"rollout.schedule = {rollout.schedule}")
    if rollout.long_tail is not None and rollout.long_tail.carry_updates:
        causes.append(f"rollout.long_tail.carry_updates = {rollout.long_tail.carry_updates}")
    corrections = (objective.importance_limit, objective.importance_token_band, objective.importance_response_band)
    by_ratio = objective.ratio_reference == "rollout" and objective.positive_term == objective.negative_term == "ratio"
    is_corrected = by_ratio or objective.functions.policy_loss is not None or any(corrections)
    if config.run.mode == "train" and causes and not is_corrected:
        logger.warning(
            "%s: tokens of older weights than the policy's train, and objective %s does not correct for them; set "
            "objective.importance_limit (for example 2.0), objective.importance_token_band or "
            "objective.importance_response_band",
            " and ".join(causes),
            objective.preset,
        )


def _servers_elsewhere(config: TrainConfig, num_processes: int) -> list[Violation]:
    """Returns a violation if this rank would share its memory with a server that is on another machine."""
    servers = config.rollout.sglang
    # Colocated servers are each on the machine of the ranks whose devices they share.
    if servers is None or servers.transport != "ipc" or servers.shares_devices or not config.generates:
        return []
    rank, tensor = int(os.environ.get("RANK", "0")), servers.tensor
    for index, url in enumerate(servers.urls):
        collectors = {collector(index * tensor + part, num_processes) for part in range(tensor)}
        if rank in collectors and not is_this_machine(urlsplit(url).hostname):
            remedy = f"It shares memory of one machine, and {url} is not on that of rank {rank}. "
            return [Violation("rollout.sglang.transport", "ipc", f"{remedy}Set rollout.sglang.transport=direct.")]
    return []


def _missing_paths(config: TrainConfig) -> list[Violation]:
    """Returns a violation for every model directory, tokenizer and data file that does not exist."""
    directories = {"model.path": config.model.path}
    if config.model.tokenizer not in ("arithmetic", config.model.path):
        directories["model.tokenizer"] = config.model.tokenizer
    violations = [
        Violation(key, path, "There is no such directory. Set it to a directory of the form of Hugging Face models.")
        for key, path in directories.items()
        if path is not None and not Path(path).is_dir()
    ]
    return violations + [
        Violation(key, path, "There is no such file or directory. Set it to a file, or to a data set's directory.")
        for key, path in config.data_paths.items()
        if not Path(path).exists()
    ]


def first_server_device(servers: SGLangConfig) -> int:
    """Returns the number of launched servers' first device: the trainer's first, or the next after the trainer's."""
    return 0 if servers.shares_devices else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def geometry_of_run(model: ModelConfig) -> GeometryConfig:
    """Returns model.geometry, or the geometry of model.path, which must agree with model.geometry where both are given.

    Raises:
        ConfigError: a size differs, and the message names all that do; or model.max_sequence_length is above the
            longest sequence that the model is made for.
        ValueError: model.path cannot be read.
    """
    if model.path is None:
        assert model.geometry is not None
        return model.geometry
    found = geometry_of(Path(model.path))
    longest = max_positions(read_model(Path(model.path)))
    if longest is not None and model.max_sequence_length > longest:
        remedy = (
            f"The config.json of {model.path} is for {longest} positions, scaling included. Set it to at most "
            f"{longest}, or change rope_scaling or max_position_embeddings there if the model is good beyond."
        )
        raise ConfigError([Violation("model.max_sequence_length", model.max_sequence_length, remedy)])
    if (expected := model.geometry) is not None:
        # Plans depend on sizes alone; the numerics (rotary base, epsilon) come from the directory.
        sizes = (
            "num_layers",
            "hidden_size",
            "ffn_hidden_size",
            "num_attention_heads",
            "num_query_groups",
            "vocab_size",
        )
        violations = [
            Violation(
                f"model.geometry.{name}",
                getattr(expected, name),
                f"{model.path} has {getattr(found, name)}. Set it to that.",
            )
            for name in sizes
            if getattr(expected, name) not in (None, getattr(found, name))
        ]
        if violations:
            raise ConfigError(violations)
    return found
