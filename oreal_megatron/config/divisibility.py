"""Divisibility of a model's sizes: by the trainer's layout, by a server's ranks, by blocks of FP8."""

from __future__ import annotations

from collections.abc import Iterator

from oreal_megatron.config.errors import ConfigError, Violation
from oreal_megatron.config.fp8_recipes import Capability
from oreal_megatron.config.geometry import GeometryConfig
from oreal_megatron.config.rollout import SGLangConfig
from oreal_megatron.config.sections import ParallelConfig

SERVED_BLOCK = 128
"""Rows and columns of a served weight that share a scale."""


def check_layout(geometry: GeometryConfig, parallel: ParallelConfig, servers: SGLangConfig | None) -> None:
    """Checks the geometry of a model directory, which is known only after the configuration was validated.

    Raises:
        ConfigError: the trainer's layout or the servers' does not divide the model, or servers cannot scale its RoPE.
    """
    violations = list(layout_violations(geometry, parallel))
    if servers is not None:
        violations += served_head_violations(servers, geometry)
        if (scaling := geometry.rope_scaling) is not None and scaling.attention_factor is not None:
            remedy = "SGLang does not read it, so servers would generate with other probabilities. Remove it from "
            remedy += "config.json or model.geometry, or set rollout=embedded."
            violations.append(Violation("rope_scaling.attention_factor", scaling.attention_factor, remedy))
    if violations:
        raise ConfigError(violations)


def layout_violations(g: GeometryConfig, parallel: ParallelConfig) -> Iterator[Violation]:
    """Yields a violation for every size of the model that the trainer's layout does not divide."""
    for key, size, split, name in (
        ("parallel.tensor", g.num_attention_heads, parallel.tensor, "attention heads"),
        ("parallel.tensor", g.ffn_hidden_size, parallel.tensor, "columns of ffn_hidden_size"),
        ("parallel.pipeline", g.num_layers, parallel.pipeline, "layers"),
    ):
        if size % split:
            remedy = f"{size} {name} do not split evenly over {split} ranks. Set {key} to a divisor of {size}."
            yield Violation(key, split, remedy)
    if g.num_attention_heads % parallel.tensor == 0 and not divides_groups(g, parallel.tensor):
        remedy = f"Set it to a divisor or a multiple of model.geometry.num_query_groups={g.num_query_groups}."
        yield Violation("parallel.tensor", parallel.tensor, remedy)
    runs = parallel.pipeline * parallel.virtual_pipeline
    if parallel.virtual_pipeline > 1 and g.num_layers % runs:
        yield Violation(
            "parallel.virtual_pipeline",
            parallel.virtual_pipeline,
            f"{g.num_layers} layers do not split evenly into {parallel.pipeline} stages x {parallel.virtual_pipeline} "
            f"runs = {runs}. Set it so that the product divides {g.num_layers}.",
        )


def divides_groups(geometry: GeometryConfig, tensor: int) -> bool:
    """Returns whether key-value heads split over `tensor` ranks, or each is copied to equally many of them."""
    return geometry.num_query_groups % tensor == 0 or tensor % geometry.num_query_groups == 0


def serving_problem(capability: Capability) -> str | None:
    """Returns why SGLang on a device of this capability holds no FP8 weights that a publication can fill.

    Source: SGLang 0.5.23. Below sm89 it reorders them for Marlin's kernels, from sm100 on it packs their scales.
    """
    if (8, 9) <= capability < (10, 0):
        return None
    found = f"sm{capability[0]}{capability[1]}"
    return f"SGLang keeps FP8 weights as they are published from sm89 to sm90, and the device is {found}"


def serving_violations(servers: SGLangConfig, capability: Capability | None) -> Iterator[Violation]:
    """Yields a violation for every reason why these servers cannot serve FP8 weights.

    capability: compute capability of their devices; None if unknown.
    """
    change = "Set rollout.sglang.dtype=null"
    if servers.device == "cpu":
        remedy = f"SGLang has FP8 kernels for CUDA only. {change}, or rollout.sglang.device=cuda."
        yield Violation("rollout.sglang.dtype", "fp8", remedy)
    if capability is not None and (problem := serving_problem(capability)):
        yield Violation("rollout.sglang.dtype", "fp8", f"{problem}. {change}.")
    if servers.transport not in ("direct", "ipc"):
        remedy = "SGLang itself loads no bfloat16 weights into FP8 layers. Set rollout.sglang.transport=direct or ipc."
        yield Violation("rollout.sglang.transport", servers.transport, remedy)


def served_head_violations(servers: SGLangConfig, geometry: GeometryConfig) -> Iterator[Violation]:
    """Yields a violation where a server's ranks do not divide the attention heads.

    With more ranks than key-value heads SGLang copies these heads on CUDA. On CPU it adds empty ones, with query heads
    for them, which no publication fills.
    """
    heads, groups, tensor = geometry.num_attention_heads, geometry.num_query_groups, servers.tensor
    if heads % tensor:
        remedy = f"{heads} attention heads do not split evenly over {tensor} devices. Set it to a divisor of {heads}."
        yield Violation("rollout.sglang.tensor", tensor, remedy)
    elif not divides_groups(geometry, tensor) or (groups % tensor and servers.device == "cpu"):
        multiple = "" if servers.device == "cpu" else " or a multiple"
        remedy = f"Set it to a divisor{multiple} of model.geometry.num_query_groups={groups}."
        yield Violation("rollout.sglang.tensor", tensor, remedy)


def served_shape_violations(servers: SGLangConfig, geometry: GeometryConfig) -> Iterator[Violation]:
    """Yields a violation for every size of a server rank's weights that FP8 blocks do not divide."""
    for problem in unserved_shapes(geometry, servers.tensor):
        remedy = f"{problem}. Set rollout.sglang.dtype=null, or another rollout.sglang.tensor."
        yield Violation("rollout.sglang.dtype", "fp8", remedy)


def unserved_shapes(geometry: GeometryConfig, tensor: int) -> list[str]:
    """Returns a phrase for every size of a server rank's weights that FP8 blocks do not divide."""
    head_dim = geometry.attention_head_dim
    sizes = {
        "hidden_size": geometry.hidden_size,
        "ffn_hidden_size": geometry.ffn_hidden_size / tensor,
        "attention heads x head_dim": geometry.num_attention_heads * head_dim / tensor,
        # Ranks beyond the number of key-value heads hold copies.
        "key-value heads x head_dim": max(geometry.num_query_groups / tensor, 1) * head_dim,
    }
    split = f" on each of {tensor} server ranks" if tensor > 1 else ""
    return [
        f"{name} is {size:g}{split}, FP8 is served in blocks of {SERVED_BLOCK} x {SERVED_BLOCK}"
        for name, size in sizes.items()
        if size % SERVED_BLOCK
    ]


def query_key_value_violations(g: GeometryConfig, parallel: ParallelConfig) -> Iterator[Violation]:
    """Yields a violation if the fused rows of queries, keys and values do not split over the tensor-parallel ranks.

    With fewer query groups than ranks, Megatron-Core cuts the fused tensor within groups.
    """
    num_rows = (g.num_attention_heads + 2 * g.num_query_groups) * g.attention_head_dim
    if num_rows % parallel.tensor:
        remedy = f"{num_rows} rows of queries, keys and values do not split evenly over {parallel.tensor} ranks"
        yield Violation("parallel.tensor", parallel.tensor, remedy)
