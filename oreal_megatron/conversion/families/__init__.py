"""The model families, a short file each, and those of other packages. docs/conversion.md shows how to add a family."""

from __future__ import annotations

import functools
from importlib.metadata import entry_points

from oreal_megatron.config import GeometryConfig
from oreal_megatron.conversion.families import llama, mistral, qwen2, qwen3
from oreal_megatron.conversion.families.decoder import Family

FAMILIES: tuple[Family, ...] = (qwen2.FAMILY, qwen3.FAMILY, llama.FAMILY, mistral.FAMILY)
"""Families of this package."""
ENTRY_POINTS = "oreal_megatron.model_families"
"""Group of the entry points by which other packages add a family."""


@functools.cache
def all_families() -> tuple[Family, ...]:
    """Returns this package's families, then those of installed packages.

    Raises:
        ValueError: a package's family cannot be imported, is no Family, or has the name or an architecture of another.
    """
    families = list(FAMILIES)
    for point in entry_points(group=ENTRY_POINTS):
        what = f"the entry point {point.name} = {point.value} of the group {ENTRY_POINTS}"
        remedy = f"Mend or uninstall the package {point.dist.name if point.dist else '?'}"
        try:
            family = point.load()
        except Exception as error:  # whatever the package's module raises
            raise ValueError(f"{what} cannot be imported: {type(error).__name__}: {error}. {remedy}") from error
        if not isinstance(family, Family):
            raise ValueError(f"{what} is a {type(family).__name__}, no Family of conversion.families.decoder. {remedy}")
        for other in families:
            if family.name == other.name or {*family.architectures.values()} & {*other.architectures.values()}:
                raise ValueError(f"{what} has the name or an architecture of the family {other.name}. {remedy}")
        families.append(family)
    return tuple(families)


def family_of(geometry: GeometryConfig) -> Family:
    """Returns the family whose decoder has this geometry's biases and norms.

    Raises:
        ValueError: no family has them.
    """
    for family in all_families():
        if (family.qkv_bias, family.qk_norm) == (geometry.qkv_bias, geometry.qk_norm):
            return family
    raise ValueError(
        f"no Hugging Face family has qkv_bias = {geometry.qkv_bias} and qk_norm = {geometry.qk_norm}. Change one of "
        "them in model.geometry, or set run.export=none."
    )
