"""The model families: one short file each, listed here. docs/conversion.md shows how to add one."""

from __future__ import annotations

from oreal_megatron.config import GeometryConfig
from oreal_megatron.convert.families import llama, qwen2, qwen3
from oreal_megatron.convert.families.decoder import Family

FAMILIES: tuple[Family, ...] = (qwen2.FAMILY, qwen3.FAMILY, llama.FAMILY)


def family_of(geometry: GeometryConfig) -> Family:
    """The family whose decoder has this geometry's biases and norms."""
    return next(f for f in FAMILIES if (f.qkv_bias, f.qk_norm) == (geometry.qkv_bias, geometry.qk_norm))
