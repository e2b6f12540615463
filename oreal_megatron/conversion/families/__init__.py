"""The model families, a short file each. docs/conversion.md shows how to add a family."""

from __future__ import annotations

from oreal_megatron.config import GeometryConfig
from oreal_megatron.conversion.families import llama, mistral, qwen2, qwen3
from oreal_megatron.conversion.families.decoder import Family

FAMILIES: tuple[Family, ...] = (qwen2.FAMILY, qwen3.FAMILY, llama.FAMILY, mistral.FAMILY)


def family_of(geometry: GeometryConfig) -> Family:
    """Returns the family whose decoder has this geometry's biases and norms.

    Raises:
        ValueError: no family has them.
    """
    for family in FAMILIES:
        if (family.qkv_bias, family.qk_norm) == (geometry.qkv_bias, geometry.qk_norm):
            return family
    raise ValueError(
        f"no Hugging Face family has qkv_bias = {geometry.qkv_bias} and qk_norm = {geometry.qk_norm}. Change one of "
        "them in model.geometry, or set run.export=none."
    )
