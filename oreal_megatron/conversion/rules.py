"""The algebra of a conversion table: which rows of which Hugging Face tensors make up a Megatron tensor.

Renaming, fusing queries, keys and values by group, stacking gate and up, padding the vocabulary: all of these move
whole rows (dimension 0). Therefore a Megatron tensor is a sequence of runs of rows, tensor parallelism and copies are
intersections of intervals, and the inverse is the same table read from the other side. Names, shapes and slices only,
without torch, files or process groups.

Dimensions by name: hidden, ffn, queries (heads x head_dim), keys (groups x head_dim), head_dim, vocabulary,
score (1).
"""

from __future__ import annotations

import enum
import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from oreal_megatron.config import GeometryConfig

Interval = tuple[int, int]
"""A range of indices [start, stop)."""


class Split(enum.Enum):
    """The part of a Megatron tensor that a tensor-parallel rank holds."""

    NONE = "all of it"
    ROWS = "a run of rows"
    COLUMNS = "a run of columns"
    HALVES = "a run of rows of each half"


@dataclass(frozen=True)
class RowRun:
    """Rows [start, stop) of a tensor."""

    tensor: str
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Box:
    """A rectangle of a tensor: rows, and columns if the tensor is a matrix."""

    rows: Interval
    columns: Interval | None

    @property
    def shape(self) -> tuple[int, ...]:
        sides = (self.rows,) if self.columns is None else (self.rows, self.columns)
        return tuple(stop - start for start, stop in sides)

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Copy:
    """A rectangle of tensor `source` that is copied to rows `at` of a buffer with the rectangle's columns."""

    source: str
    box: Box
    at: Interval


@dataclass(frozen=True)
class Entry:
    """A tensor of one format over all ranks, and the rows of the other format's tensors that make it up, in order."""

    name: str
    layer: int | None
    """Global layer number of a Megatron tensor, from 0; None outside the layers, and for Hugging Face tensors."""
    shape: tuple[int, ...]
    """Shape without padding."""
    split: Split
    runs: tuple[RowRun, ...]
    is_vocabulary: bool = False
    """Whether rows of zeros may follow the last one."""

    @property
    def num_columns(self) -> int | None:
        return self.shape[1] if len(self.shape) > 1 else None

    def whole(self, num_rows: int | None = None) -> Box:
        """Returns the rectangle of the whole tensor; num_rows: number of rows with padding."""
        columns = self.num_columns
        return Box((0, num_rows or self.shape[0]), None if columns is None else (0, columns))

    def boxes(self, size: int, rank: int, num_rows: int | None = None) -> tuple[Box, ...]:
        """Returns the rectangles that rank `rank` of `size` tensor ranks holds, in the order of its rows.

        num_rows: number of rows of the tensor with padding.

        Raises:
            ValueError: the tensor does not split over that number of ranks.
        """
        whole = self.whole(num_rows)
        rows = whole.rows[1]
        if self.split is Split.NONE:
            return (whole,)
        if self.split is Split.COLUMNS:
            assert whole.columns is not None
            return (Box(whole.rows, self._part(whole.columns[1], size, rank, "columns")),)
        if self.split is Split.ROWS:
            return (Box(self._part(rows, size, rank, "rows"), whole.columns),)
        start, stop = self._part(rows // 2, size, rank, "rows of each half")
        return tuple(Box((start + half, stop + half), whole.columns) for half in (0, rows // 2))

    def _part(self, length: int, size: int, rank: int, what: str) -> Interval:
        if length % size:
            raise ValueError(f"{self.name}: {length} {what} do not split evenly over {size} tensor-parallel ranks")
        return rank * (length // size), (rank + 1) * (length // size)

    def sources(self, box: Box) -> Iterator[Copy]:
        """Yields the rectangles of the other format's tensors that fill `box`; rows of padding have none."""
        first = 0
        for run in self.runs:
            if (common := overlap((first, first + len(run)), box.rows)) is not None:
                shift = run.start - first
                source = Box((common[0] + shift, common[1] + shift), box.columns)
                yield Copy(run.tensor, source, (common[0] - box.rows[0], common[1] - box.rows[0]))
            first += len(run)


def overlap(a: Interval, b: Interval) -> Interval | None:
    """Returns the indices that two ranges share; None if there are none."""
    start, stop = max(a[0], b[0]), min(a[1], b[1])
    return (start, stop) if start < stop else None


@dataclass(frozen=True)
class Table:
    """All tensors of a model, from both sides."""

    entries: Mapping[str, Entry]
    """Megatron tensors by name, in the order of a forward pass."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Second Hugging Face names of tied tensors -> first names. A source may hold them if they are equal; they are not
    written."""
    module_aliases: Mapping[str, str] = field(default_factory=dict)
    """Second Megatron names of tied tensors -> first names; the last pipeline stage has parameters for them."""
    origins: Mapping[str, Entry] = field(init=False)
    """Hugging Face tensors by name, in the order of a forward pass."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "origins", _inverse(self.entries.values()))


def _inverse(entries: Iterable[Entry]) -> dict[str, Entry]:
    """Builds the Hugging Face side. Raises ValueError if rows are missing or occur twice."""
    used: dict[str, list[tuple[RowRun, RowRun]]] = defaultdict(list)
    """Hugging Face tensor -> pairs of its rows and their rows in Megatron's tensor."""
    columns: dict[str, tuple[int, ...]] = {}
    for entry in entries:
        first = 0
        for run in entry.runs:
            used[run.tensor].append((run, RowRun(entry.name, first, first + len(run))))
            columns[run.tensor] = entry.shape[1:]
            first += len(run)
        if first != entry.shape[0]:
            raise ValueError(f"{entry.name} has {entry.shape[0]} rows, its rules give {first}")
    origins = {}
    for name, pairs in used.items():
        pairs.sort(key=lambda pair: pair[0].start)
        end = 0
        for run, _ in pairs:
            if run.start != end:
                where = f"rows {min(end, run.start)} to {max(end, run.start)}"
                raise ValueError(f"{name}: the rules use {where} {'never' if end < run.start else 'twice'}")
            end = run.stop
        origins[name] = Entry(name, None, (end, *columns[name]), Split.NONE, tuple(inside for _, inside in pairs))
    return origins


@dataclass(frozen=True)
class Same:
    """A tensor that is the same in both formats, apart from its name and from rows of zeros behind a vocabulary.

    `{layer}` in a rule's names stands for the number of a layer.
    """

    megatron: str
    huggingface: str
    shape: Sequence[str]
    """Names of the dimensions; a tensor with a row for each token begins with `vocabulary`."""
    split: Split = Split.NONE
    tied_to: Same | None = None
    """Tensor that this one is a second name of in models with tied embeddings."""

    def entry(self, sizes: Mapping[str, int], layer: int | None) -> Entry:
        """Returns the tensor that the rule describes, for the sizes of a model."""
        shape = tuple(sizes[dimension] for dimension in self.shape)
        run = RowRun(self.huggingface.format(layer=layer), 0, shape[0])
        is_vocabulary = self.shape[0] == "vocabulary"
        return Entry(self.megatron.format(layer=layer), layer, shape, self.split, (run,), is_vocabulary)


@dataclass(frozen=True)
class GroupedQKV:
    """Queries, keys and values in a single tensor, group by group: the queries of a group, its key, its value."""

    megatron: str
    query: str
    key: str
    value: str
    columns: Sequence[str] = ("hidden",)
    """Dimensions after the rows; empty for a bias."""

    def entry(self, sizes: Mapping[str, int], layer: int | None) -> Entry:
        """See `Same.entry`."""
        head_dim = sizes["head_dim"]
        num_groups = sizes["keys"] // head_dim
        queries = sizes["queries"] // num_groups
        q, k, v = (name.format(layer=layer) for name in (self.query, self.key, self.value))
        runs = [
            run
            for group in range(num_groups)
            for run in (
                RowRun(q, group * queries, (group + 1) * queries),
                RowRun(k, group * head_dim, (group + 1) * head_dim),
                RowRun(v, group * head_dim, (group + 1) * head_dim),
            )
        ]
        shape = (sizes["queries"] + 2 * sizes["keys"], *(sizes[dimension] for dimension in self.columns))
        return Entry(self.megatron.format(layer=layer), layer, shape, Split.ROWS, tuple(runs))


@dataclass(frozen=True)
class Stacked:
    """A tensor with the gate's rows, then the up projection's rows."""

    megatron: str
    gate: str
    up: str

    def entry(self, sizes: Mapping[str, int], layer: int | None) -> Entry:
        """See `Same.entry`."""
        runs = tuple(RowRun(name.format(layer=layer), 0, sizes["ffn"]) for name in (self.gate, self.up))
        shape = (2 * sizes["ffn"], sizes["hidden"])
        return Entry(self.megatron.format(layer=layer), layer, shape, Split.HALVES, runs)


Rule = Same | GroupedQKV | Stacked
"""A line of a family's table."""


def sizes_of(geometry: GeometryConfig) -> dict[str, int]:
    """Returns the sizes of a model's dimensions, by name."""
    if geometry.vocab_size is None:
        raise ValueError("geometry.vocab_size = None: a conversion needs the number of rows of the embedding")
    head_dim = geometry.attention_head_dim
    return {
        "hidden": geometry.hidden_size,
        "ffn": geometry.ffn_hidden_size,
        "queries": geometry.num_attention_heads * head_dim,
        "keys": geometry.num_query_groups * head_dim,
        "head_dim": head_dim,
        "vocabulary": geometry.vocab_size,
        "score": 1,
    }


def build_table(rules: Iterable[Rule], geometry: GeometryConfig) -> Table:
    """Builds the table of a family's rules for a geometry.

    Raises:
        ValueError: the rules leave out a row or use it twice.
    """
    sizes = sizes_of(geometry)
    entries: list[Entry] = []
    aliases, module_aliases = {}, {}
    for is_layer, run in itertools.groupby(rules, lambda rule: "{layer}" in rule.megatron):
        for layer, rule in itertools.product(range(geometry.num_layers) if is_layer else (None,), list(run)):
            if isinstance(rule, Same) and rule.tied_to is not None and geometry.tied_embeddings:
                aliases[rule.huggingface] = rule.tied_to.huggingface
                module_aliases[rule.megatron] = rule.tied_to.megatron
            else:
                entries.append(rule.entry(sizes, layer))
    return Table({entry.name: entry for entry in entries}, aliases, module_aliases)
