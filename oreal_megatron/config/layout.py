"""What a layout asks of a model's sizes."""

from __future__ import annotations

from collections.abc import Iterator

from oreal_megatron.config.rollout import SGLangConfig
from oreal_megatron.config.sections import GeometryConfig, ParallelConfig
from oreal_megatron.config.serving import served_head_violations
from oreal_megatron.config.violations import ConfigError, Violation


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
