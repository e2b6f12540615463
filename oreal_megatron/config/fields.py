"""Base class of the configuration's sections, and types with ranges for their fields."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

LARGEST = 2**63 - 1
"""Largest integer that torch and the files of a run hold."""
Positive = Annotated[int, Field(gt=0, le=LARGEST)]
NonNegative = Annotated[int, Field(ge=0, le=LARGEST)]
Port = Annotated[int, Field(gt=0, le=65535)]
Seed = Annotated[int, Field(ge=0, lt=2**62)]
"""Number that torch takes as a seed, also after Megatron-Core has added its offsets."""
PositiveFloat = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _not_empty(value: str) -> str:
    if not value.strip():
        raise ValueError("It is empty. Set it to a text.")
    if any(character < " " for character in value):
        raise ValueError("It has control characters, such as a new line. Set it to a text without them.")
    return value


Text = Annotated[str, AfterValidator(_not_empty)]
"""A text in one line that is not empty, such as a name or a path."""


def _file_name(value: str) -> str:
    if not value.strip() or "/" in value or value.startswith("."):
        raise ValueError("It is part of file names. Give it a name without `/` that does not begin with a dot.")
    return value


FileName = Annotated[str, AfterValidator(_file_name)]
"""A name that becomes a part of file names."""


def _day(value: str) -> str:
    try:
        return date.fromisoformat(value).isoformat()
    except ValueError:
        raise ValueError("It is no day. Set it to one such as 2026-11-29, or to null.") from None


Day = Annotated[str, AfterValidator(_day)]
"""A day as YYYY-MM-DD."""
AsTuple = BeforeValidator(_as_tuple)
"""Turns a list of YAML into the tuple that a frozen section needs."""
AsPath = BeforeValidator(lambda value: {"path": value} if isinstance(value, str) else value)
"""Lets the path alone stand for a section with the key `path`."""
Strings = Annotated[tuple[str, ...], AsTuple]
Finite = Annotated[float, Field(allow_inf_nan=False)]
FloatPair = Annotated[tuple[Finite, Finite], AsTuple]
StepRange = Annotated[tuple[NonNegative, NonNegative], AsTuple]
"""Numbers of a first and a last step."""
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]


class Section(BaseModel):
    """Base of the configuration's sections: no unknown keys, no coercion, immutable."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class FunctionConfig(Section):
    """A function of one's own: its path alone, or a mapping of path and settings."""

    path: Text
    """Function, as `module.name`, in a module on PYTHONPATH."""
    settings: Mapping[str, Any] = {}
    """Values of the pydantic model with which the function's parameter `settings` is annotated."""


Function = Annotated[FunctionConfig, AsPath]
