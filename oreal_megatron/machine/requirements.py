"""Checks of a run's requirements against the results of a probe."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from oreal_megatron.config import (
    ConfigError,
    Fp8ModelConfig,
    GeometryConfig,
    ModelConfig,
    ParallelConfig,
    SGLangConfig,
    TrainConfig,
    Violation,
    served_shape_violations,
    serving_violations,
)
from oreal_megatron.config.fp8_recipes import RECIPES, device_problem, recipes_for
from oreal_megatron.machine.probe import Machine, Topic, probe

TRANSFORMER_ENGINE = ((2, 9), (2, 12))
"""First supported version, and first newer unsupported version, of Transformer Engine for megatron-core 0.16."""


def check_machine(config: TrainConfig, geometry_of: Callable[[ModelConfig], GeometryConfig]) -> None:
    """Probes this machine for the requirements of a configuration, if it has any.

    geometry_of: returns the model's geometry, from its directory if necessary.

    Raises:
        ConfigError: with every setting that this machine cannot run.
    """
    topics = asked(config)
    if not topics and _served_in_fp8(config) is None:
        return
    if violations := violations_of(config, geometry_of(config.model), probe(topics)):
        raise ConfigError(violations)


def asked(config: TrainConfig) -> list[Topic]:
    """Returns the topics to probe, for requirements that not every run has."""
    topics: list[Topic] = []
    if config.resources.device != "cpu":
        topics.append("nccl")
    if config.model.implementation == "transformer_engine" or config.fp8.models:
        topics.append("transformer_engine")
    if config.parallel.fused_weight_gradients:
        topics.append("apex")
    return topics


def violations_of(config: TrainConfig, geometry: GeometryConfig, machine: Machine) -> list[Violation]:
    """Returns a violation for every setting that this machine or the model's shape does not support."""
    found: list[Violation] = []
    if config.resources.device != "cpu" and not machine.has_cuda:
        # Without this check the run would compute on the CPU.
        remedy = f"{_no_cuda(machine)}. Start the run on such a device, or set resources=local."
        found.append(Violation("resources.device", config.resources.device, remedy))
    if config.model.implementation == "transformer_engine" and (problem := transformer_engine_problem(machine)):
        remedy = f"{problem}. Run {install_line(machine)}, or set model.implementation=local."
        found.append(Violation("model.implementation", "transformer_engine", remedy))
    for name, fp8 in config.fp8.models.items():
        found += _fp8_machine_violations(f"fp8.{name}", fp8, machine)
        found += _fp8_shape_violations(f"fp8.{name}", fp8, geometry, config.parallel)
    if (servers := _served_in_fp8(config)) is not None:
        found += served_shape_violations(servers, geometry)
        if not servers.urls:  # launched on this machine
            for capability in sorted({capability for _, capability in machine.devices}):
                found += serving_violations(servers, capability)
    if config.parallel.fused_weight_gradients and (problem := _apex_problem(machine)):
        remedy = (
            f"{problem}. Build NVIDIA's apex from source (github.com/NVIDIA/apex, with --cuda_ext and fused weight "
            "gradients; `pip install apex` installs another package), use an NGC container, or set "
            "parallel.fused_weight_gradients=false."
        )
        found.append(Violation("parallel.fused_weight_gradients", True, remedy))
    return found


def _served_in_fp8(config: TrainConfig) -> SGLangConfig | None:
    servers = config.rollout.sglang
    return servers if servers is not None and servers.dtype == "fp8" else None


def transformer_engine_problem(machine: Machine) -> str | None:
    """Returns why Transformer Engine cannot be used here; None if it can."""
    if not machine.has_cuda:
        return f"Transformer Engine needs CUDA: {_no_cuda(machine)}"
    if machine.transformer_engine.found is None:
        return f"Transformer Engine does not work here ({machine.transformer_engine.problem})"
    low, high = TRANSFORMER_ENGINE
    if not low <= _numbers(machine.transformer_engine.found) < high:
        wanted = f">={_dotted(low)},<{_dotted(high)}"
        return f"Transformer Engine {machine.transformer_engine.found} is installed, megatron-core needs {wanted}"
    return None


def install_line(machine: Machine) -> str:
    """Returns the command that installs Transformer Engine for this torch and CUDA."""
    low, high = TRANSFORMER_ENGINE
    major = machine.cuda_version[0] or 13
    package = f"transformer-engine[pytorch,core_cu{major}]>={_dotted(low)},<{_dotted(high)}"
    # Its extension for torch is compiled beside the installed torch, with these packages.
    line = f"pip install setuptools wheel ninja pybind11 && pip install --no-build-isolation '{package}'"
    if machine.cuda is None:
        return f"install a torch built for CUDA (found: {machine.torch.found}), then {line}"
    return line


def _no_cuda(machine: Machine) -> str:
    if machine.torch.found is None:
        return f"torch does not import ({machine.torch.problem})"
    if machine.cuda is None:
        return f"torch {machine.torch.found} is built without CUDA"
    return f"torch {machine.torch.found} sees no device (check resources.device, CUDA_VISIBLE_DEVICES and the driver)"


def _fp8_machine_violations(key: str, fp8: Fp8ModelConfig, machine: Machine) -> Iterator[Violation]:
    recipe = RECIPES[fp8.recipe]
    if problem := transformer_engine_problem(machine):
        remedy = f"FP8 needs Transformer Engine: {problem}. Run {install_line(machine)}, or set {key}=null."
        yield Violation(f"{key}.recipe", fp8.recipe, remedy)
    if not machine.has_cuda:
        return
    for capability in sorted({capability for _, capability in machine.devices}):
        if problem := device_problem(fp8.recipe, capability):
            possible = "".join(f"{key}.recipe={name} or " for name in recipes_for(capability))
            yield Violation(f"{key}.recipe", fp8.recipe, f"{problem}. Set {possible}{key}=null.")
    if machine.cuda_version < recipe.cuda:
        remedy = f"{fp8.recipe} needs CUDA {_dotted(recipe.cuda)}, torch is built for {machine.cuda}. Install another."
        yield Violation(f"{key}.recipe", fp8.recipe, remedy)


def _fp8_shape_violations(
    key: str, fp8: Fp8ModelConfig, geometry: GeometryConfig, parallel: ParallelConfig
) -> Iterator[Violation]:
    multiple, per_stage = RECIPES[fp8.recipe].multiple, geometry.num_layers // parallel.pipeline
    for name, size in rank_dimensions(geometry, parallel.tensor).items():
        if size % multiple:
            fitting = [other for other, recipe in RECIPES.items() if size % recipe.multiple == 0]
            others = "".join(f"{key}.recipe={other} or " for other in fitting)
            split = f" on each of {parallel.tensor} tensor ranks" if parallel.tensor > 1 else ""
            remedy = f"{name} is {size}{split}, {fp8.recipe} needs a multiple of {multiple}. Set {others}{key}=null."
            yield Violation(f"{key}.recipe", fp8.recipe, remedy)
    for end in ("first", "last"):
        name = f"bf16_{end}_layers"
        if (num_layers := getattr(fp8, name)) > per_stage:
            yield Violation(
                f"{key}.{name}", num_layers, f"A pipeline stage has {per_stage} layers. Set it to at most {per_stage}."
            )


def rank_dimensions(geometry: GeometryConfig, tensor: int) -> dict[str, int]:
    """Every dimension of the matrices of a layer, as a tensor rank holds them."""
    head_dim = geometry.attention_head_dim
    queries = geometry.num_attention_heads * head_dim
    keys = geometry.num_query_groups * head_dim
    return {
        "hidden_size": geometry.hidden_size,
        "attention heads x head_dim": queries // tensor,
        "queries, keys and values": (queries + 2 * keys) // tensor,
        "ffn_hidden_size": geometry.ffn_hidden_size // tensor,
    }


def _apex_problem(machine: Machine) -> str | None:
    if not machine.has_cuda:
        return f"It needs CUDA: {_no_cuda(machine)}"
    if machine.apex.found is None:
        return f"NVIDIA's apex with its kernel fused_weight_gradient_mlp_cuda is missing ({machine.apex.problem})"
    return None


def _numbers(version: str) -> tuple[int, int]:
    major, minor = re.findall(r"\d+", version)[:2]
    return int(major), int(minor)


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
