"""FP8 recipes: what each needs of a device, of CUDA and of shapes. Data only; everything that asks reads it here.

From the sources of Transformer Engine 2.9 to 2.11 and Megatron-Core 0.16.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RecipeName = Literal["delayed", "tensorwise", "blockwise", "mxfp8"]
Capability = tuple[int, int]


@dataclass(frozen=True)
class Recipe:
    """One FP8 recipe."""

    capability: Capability
    """Lowest compute capability."""
    below: Capability | None
    """First compute capability without kernels again; None: none known."""
    cuda: tuple[int, int]
    """Lowest CUDA version."""
    multiple: int
    """Both dimensions of every matrix, as a tensor rank holds it, must be a multiple of this. Without blocks,
    Transformer Engine asks for 8 and, of the last one, 16; gradients read the same matrices the other way round, so
    every dimension is the last one once."""
    tokens: int
    """The tokens that a rank puts through a matrix product must be a multiple of this."""


RECIPES: dict[RecipeName, Recipe] = {
    "delayed": Recipe(capability=(8, 9), below=None, cuda=(12, 1), multiple=16, tokens=16),
    "tensorwise": Recipe(capability=(8, 9), below=None, cuda=(12, 1), multiple=16, tokens=16),
    "blockwise": Recipe(capability=(9, 0), below=None, cuda=(12, 9), multiple=128, tokens=128),
    "mxfp8": Recipe(capability=(10, 0), below=(12, 0), cuda=(12, 8), multiple=32, tokens=32),
}

CAPABILITIES: dict[str, Capability] = {"a100_80gb": (8, 0), "h100_80gb": (9, 0)}
"""Of the devices that `resources.device` names."""


def device_problem(name: RecipeName, capability: Capability) -> str | None:
    """Why a device of this capability cannot run the recipe."""
    recipe = RECIPES[name]
    found = f"sm{capability[0]}{capability[1]}"
    if capability < recipe.capability:
        return f"{name} needs sm{recipe.capability[0]}{recipe.capability[1]} or newer, this is {found}"
    if recipe.below is not None and capability >= recipe.below:
        return f"{name} has no kernels from sm{recipe.below[0]}{recipe.below[1]} on, this is {found}"
    return None


def recipes_for(capability: Capability) -> list[RecipeName]:
    return [name for name in RECIPES if device_problem(name, capability) is None]
