"""Base class of the configuration's sections, and types with ranges for their fields."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**62)]
"""Number that torch takes as a seed, also after Megatron-Core has added its offsets."""
PositiveFloat = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


AsTuple = BeforeValidator(_as_tuple)
"""Turns a list of YAML into the tuple that a frozen section needs."""
Strings = Annotated[tuple[str, ...], AsTuple]
FloatPair = Annotated[tuple[float, float], AsTuple]


class Section(BaseModel):
    """Base of the configuration's sections: no unknown keys, no coercion, immutable."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)
