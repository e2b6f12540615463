"""The parsed form of a final answer: expressions at the leaves, and the shapes around them."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from oreal_megatron.verifier.latex.units_and_words import Unit


@dataclass(frozen=True)
class Leaf:
    """A single expression, its exact value if it is a plain number, its unit, and whether a percent sign followed."""

    latex: str
    value: Fraction | None = None
    unit: Unit | None = None
    percent: bool = False


@dataclass(frozen=True)
class Text:
    """Words; `latex` is the answer as it was written."""

    words: str
    latex: str


@dataclass(frozen=True)
class Based:
    """A numeral with its base, such as 101_2."""

    digits: str
    base: int


@dataclass(frozen=True)
class Ratio:
    """A ratio such as 2:3, or a time of day if `clock`."""

    parts: tuple[Node, ...]
    clock: bool


@dataclass(frozen=True)
class Bracketed:
    """Ordered parts between brackets: a tuple or an interval, which only the other answer can tell."""

    parts: tuple[Node, ...]
    opening: str
    closing: str


@dataclass(frozen=True)
class Collection:
    """Parts without order: a list of solutions, a set if `braces`, alternatives if "or" joins them."""

    parts: tuple[Node, ...]
    braces: bool = False
    alternative: bool = False


@dataclass(frozen=True)
class SetOperation:
    """A union, intersection or difference of sets, or statements joined by "or" or "and"."""

    operator: str
    parts: tuple[Node, ...]


@dataclass(frozen=True)
class Relation:
    """A chain such as `a < b <= c`, with one more item than operators."""

    items: tuple[Node, ...]
    operators: tuple[str, ...]


@dataclass(frozen=True)
class Matrix:
    """Rows of equal length."""

    rows: tuple[tuple[Node, ...], ...]


Node = Leaf | Text | Based | Ratio | Bracketed | Collection | SetOperation | Relation | Matrix
