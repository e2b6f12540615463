"""FP8 recipes: requirements of each on device, CUDA version and matrix shapes. Data only.

Source: Transformer Engine 2.9 to 2.11 and Megatron-Core 0.16.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RecipeName = Literal["delayed", "tensorwise", "blockwise", "mxfp8"]
Capability = tuple[int, int]


@dataclass(frozen=True)
class Recipe:
    """Requirements of an FP8 recipe."""

    capability: Capability
    """Lowest compute capability."""
    below: Capability | None
    """First newer compute capability without kernels. None: all newer ones have kernels."""
    cuda: tuple[int, int]
    """Lowest CUDA version."""
    multiple: int
    """Number that divides both dimensions of every matrix, as a tensor rank holds it. Recipes without blocks need 16 in
    the last dimension and 8 in the other; gradients read the matrices transposed, so every dimension needs 16."""
    tokens: int
    """Number that divides the tokens of a rank's matrix product."""


RECIPES: dict[RecipeName, Recipe] = {
    "delayed": Recipe(capability=(8, 9), below=None, cuda=(12, 1), multiple=16, tokens=16),
    "tensorwise": Recipe(capability=(8, 9), below=None, cuda=(12, 1), multiple=16, tokens=16),
    "blockwise": Recipe(capability=(9, 0), below=None, cuda=(12, 9), multiple=128, tokens=128),
    "mxfp8": Recipe(capability=(10, 0), below=(12, 0), cuda=(12, 8), multiple=32, tokens=32),
}

CAPABILITIES: dict[str, Capability] = {"a100_80gb": (8, 0), "h100_80gb": (9, 0)}
"""Compute capability of each device that `resources.device` names."""


def device_problem(name: RecipeName, capability: Capability) -> str | None:
    """Returns why a device of this capability cannot run the recipe; None where it can."""
    recipe = RECIPES[name]
    found = f"sm{capability[0]}{capability[1]}"
    if capability < recipe.capability:
        return f"{name} needs sm{recipe.capability[0]}{recipe.capability[1]} or newer, the device is {found}"
    if recipe.below is not None and capability >= recipe.below:
        return f"{name} has no kernels from sm{recipe.below[0]}{recipe.below[1]} on, the device is {found}"
    return None


def recipes_for(capability: Capability) -> list[RecipeName]:
    """Returns the recipes that a device of this capability can run."""
    return [name for name in RECIPES if device_problem(name, capability) is None]
