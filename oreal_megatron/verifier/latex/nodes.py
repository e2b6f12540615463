"""What a final answer can be: expressions at the leaves, and the shapes around them."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from oreal_megatron.verifier.latex.units_and_words import Unit


@dataclass(frozen=True)
class Leaf:
    """One expression. `unit` is what stood beside it; `percent` whether it was followed by a percent sign."""

    latex: str
    value: Fraction | None = None
    unit: Unit | None = None
    percent: bool = False


@dataclass(frozen=True)
class Text:
    """Words. `latex` is the answer as it stood."""

    words: str
    latex: str


@dataclass(frozen=True)
class Based:
    """A numeral with its base, such as 101_2."""

    digits: str
    base: int


@dataclass(frozen=True)
class Ratio:
    """2:3, or a time of day."""

    parts: tuple[Node, ...]
    clock: bool


@dataclass(frozen=True)
class Bracketed:
    """Parts between brackets: a tuple or an interval, as the other side will say; ordered."""

    parts: tuple[Node, ...]
    opening: str
    closing: str


@dataclass(frozen=True)
class Collection:
    """Parts without order: a list of solutions, or a set where `braces`; `alternative` where joined by "or"."""

    parts: tuple[Node, ...]
    braces: bool = False
    alternative: bool = False


@dataclass(frozen=True)
class SetOperation:
    """Union, intersection or difference of sets; "or" and "and" of statements."""

    operator: str
    parts: tuple[Node, ...]


@dataclass(frozen=True)
class Relation:
    """A chain `a < b <= c`: one more item than operators."""

    items: tuple[Node, ...]
    operators: tuple[str, ...]


@dataclass(frozen=True)
class Matrix:
    rows: tuple[tuple[Node, ...], ...]


Node = Leaf | Text | Based | Ratio | Bracketed | Collection | SetOperation | Relation | Matrix
