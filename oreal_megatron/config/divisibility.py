"""Which sizes of a model must divide by what: by the trainer's layout, by a server's ranks, by blocks of FP8."""

from __future__ import annotations

from collections.abc import Iterator

from oreal_megatron.config.errors import ConfigError, Violation
from oreal_megatron.config.fp8_recipes import Capability
from oreal_megatron.config.rollout import SGLangConfig
from oreal_megatron.config.sections import GeometryConfig, ParallelConfig


def check_layout(geometry: GeometryConfig, parallel: ParallelConfig, servers: SGLangConfig | None) -> None:
    """For a geometry that a model directory brought. Raises ConfigError where trainer or servers do not divide it."""
    violations = list(layout_violations(geometry, parallel))
    if servers is not None:
        violations += served_head_violations(servers, geometry)
    if violations:
        raise ConfigError(violations)


def layout_violations(g: GeometryConfig, parallel: ParallelConfig) -> Iterator[Violation]:
    for key, size, split, by in (
        ("parallel.tensor", g.num_attention_heads, parallel.tensor, "attention heads"),
        ("parallel.tensor", g.ffn_hidden_size, parallel.tensor, "columns of ffn_hidden_size"),
        ("parallel.pipeline", g.num_layers, parallel.pipeline, "layers"),
    ):
        if size % split:
            yield Violation(key, split, f"{size} {by} do not split evenly over {split} ranks")
    apart = g.num_query_groups % parallel.tensor and parallel.tensor % g.num_query_groups
    if apart and g.num_attention_heads % parallel.tensor == 0:
        yield Violation(
            "parallel.tensor",
            parallel.tensor,
            f"must divide model.geometry.num_query_groups = {g.num_query_groups} or be a multiple of it",
        )
    runs = parallel.pipeline * parallel.virtual_pipeline
    if parallel.virtual_pipeline > 1 and g.num_layers % runs:
        yield Violation(
            "parallel.virtual_pipeline",
            parallel.virtual_pipeline,
            f"{g.num_layers} layers do not split evenly into {parallel.pipeline} stages x "
            f"{parallel.virtual_pipeline} runs = {runs}",
        )


SERVED_BLOCK = 128
"""Rows and columns of a served weight that share a scale."""

_KEY = "rollout.sglang.dtype"


def serving_problem(capability: Capability) -> str | None:
    """Why SGLang 0.5.23 on a device of this capability holds no FP8 weights that a publication can fill.

    From its source: below sm89 it puts them in the order of Marlin's kernels, from sm100 on it packs their scales.
    """
    if (8, 9) <= capability < (10, 0):
        return None
    return f"SGLang keeps FP8 weights as they are published from sm89 to sm90, this is sm{capability[0]}{capability[1]}"


def serving_violations(servers: SGLangConfig, capability: Capability | None) -> Iterator[Violation]:
    """capability: of the devices that are meant; None: not known."""
    if servers.device == "cpu":
        yield Violation(_KEY, "fp8", "SGLang's kernels for it are for CUDA: null, or rollout.sglang.device=cuda")
    if capability is not None and (problem := serving_problem(capability)):
        yield Violation(_KEY, "fp8", f"{problem}: null")
    if servers.transport not in ("direct", "ipc"):
        remedy = "has SGLang load the weights, which takes none in bfloat16 into FP8 layers: direct, or ipc"
        yield Violation("rollout.sglang.transport", servers.transport, remedy)


def served_head_violations(servers: SGLangConfig, geometry: GeometryConfig) -> Iterator[Violation]:
    """Heads that do not split over a server's ranks. SGLang copies key-value heads where there are more ranks than
    these, but on a CPU it adds empty ones, with query heads to them, which no publication fills."""
    heads, groups, tensor = geometry.num_attention_heads, geometry.num_query_groups, servers.tensor
    if heads % tensor:
        remedy = f"{heads} attention heads do not split evenly over {tensor} devices"
        yield Violation("rollout.sglang.tensor", tensor, remedy)
    elif groups % tensor and (tensor % groups or servers.device == "cpu"):
        copies = "" if servers.device == "cpu" else " or be a multiple of it"
        remedy = f"must divide model.geometry.num_query_groups = {groups}{copies}"
        yield Violation("rollout.sglang.tensor", tensor, remedy)


def served_shape_violations(servers: SGLangConfig, geometry: GeometryConfig) -> Iterator[Violation]:
    """Every size that does not divide into whole blocks."""
    for problem in unserved_shapes(geometry, servers.tensor):
        yield Violation(_KEY, "fp8", f"{problem}: null, or another rollout.sglang.tensor")


def unserved_shapes(geometry: GeometryConfig, tensor: int) -> list[str]:
    """What of a server rank's weights does not divide into whole blocks, each with its size."""
    head_dim = geometry.head_dim or geometry.hidden_size // geometry.num_attention_heads
    sizes = {
        "hidden_size": geometry.hidden_size,
        "ffn_hidden_size": geometry.ffn_hidden_size / tensor,
        "attention heads x head_dim": geometry.num_attention_heads * head_dim / tensor,
        # Ranks beyond the number of key-value heads hold copies.
        "key-value heads x head_dim": max(geometry.num_query_groups / tensor, 1) * head_dim,
    }
    split = f" on each of {tensor} server ranks" if tensor > 1 else ""
    return [
        f"{what} is {size:g}{split}, FP8 is served in blocks of {SERVED_BLOCK} x {SERVED_BLOCK}"
        for what, size in sizes.items()
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
