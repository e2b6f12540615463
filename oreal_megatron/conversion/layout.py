"""Places of tensors: the parts that pipeline stages and tensor ranks hold, with a proof that no element is lost."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from oreal_megatron.config import GeometryConfig, ParallelConfig
from oreal_megatron.config.divisibility import layout_violations, query_key_value_violations
from oreal_megatron.conversion.rules import Box, Entry, Interval, Table

_OPTIONS = {
    "parallel.tensor": "--tensor-parallel",
    "parallel.pipeline": "--pipeline-parallel",
    "parallel.virtual_pipeline": "--virtual-pipeline",
}
"""Options of the conversion tools, by the configuration's key."""


@dataclass(frozen=True)
class Layout:
    """A split of a model over ranks, and the number of its replicas.

    Ranks are ordered as Megatron-Core orders them: tensor fastest, then context, data, pipeline.
    """

    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    """Runs of layers of a pipeline stage; more than 1 for the interleaved schedule."""
    vocabulary_multiple: int = 1
    """Number whose product with the tensor ranks divides the padded rows of the vocabulary."""
    context: int = 1
    """Replicas that share sequences; a checkpoint does not depend on them."""
    data: int = 1
    """Replicas with data of their own; a checkpoint does not depend on them."""

    @property
    def num_ranks(self) -> int:
        return self.tensor * self.pipeline * self.context * self.data

    def replicas(self, pipeline_rank: int, tensor_rank: int) -> tuple[int, ...]:
        """Returns the global ranks that hold the shard (pipeline_rank, tensor_rank)."""
        copies = self.context * self.data
        first = pipeline_rank * copies * self.tensor + tensor_rank
        return tuple(first + copy * self.tensor for copy in range(copies))

    def check(self, geometry: GeometryConfig) -> None:
        """Raises ValueError, with every reason, if a model of this geometry cannot be split in this layout."""
        ranks = ParallelConfig(
            tensor=self.tensor, pipeline=self.pipeline, virtual_pipeline=self.virtual, micro_batch_tokens=1
        )
        violations = [*layout_violations(geometry, ranks), *query_key_value_violations(geometry, ranks)]
        problems = [f"{_OPTIONS[found.key]} {found.value}: {found.remedy}" for found in violations]
        if self.virtual > 1 and self.pipeline == 1:
            problems.append(f"--virtual-pipeline {self.virtual}: needs --pipeline-parallel 2 or more")
        if problems:
            raise ValueError("the model does not split: " + "; ".join(problems))

    def padded_rows(self, entry: Entry) -> int:
        """Returns the number of the tensor's rows with padding."""
        if not entry.is_vocabulary:
            return entry.shape[0]
        multiple = self.vocabulary_multiple * self.tensor
        return -(-entry.shape[0] // multiple) * multiple

    def stage_of(self, entry: Entry, num_layers: int) -> tuple[int, int]:
        """Returns the (pipeline rank, virtual stage) that holds the tensor."""
        if entry.layer is None:
            return (0, 0) if entry.name.startswith("embedding.") else (self.pipeline - 1, self.virtual - 1)
        chunk = entry.layer // (num_layers // (self.pipeline * self.virtual))
        return chunk % self.pipeline, chunk // self.pipeline


@dataclass(frozen=True)
class Shard:
    """The part of a Megatron tensor that a rank holds."""

    entry: Entry
    pipeline_rank: int
    virtual_stage: int
    tensor_rank: int
    boxes: tuple[Box, ...]
    is_copy: bool = False
    """Whether another rank holds the same elements: a tensor that is replicated over tensor ranks, or the last stage's
    copy of a tied embedding."""

    @property
    def num_elements(self) -> int:
        return sum(box.num_elements for box in self.boxes)


def shards(table: Table, layout: Layout, num_layers: int) -> Iterator[Shard]:
    """Yields every rank's part of every tensor, with copies, in the order of a forward pass."""
    for entry in table.entries.values():
        pipeline_rank, virtual_stage = layout.stage_of(entry, num_layers)
        for rank in range(layout.tensor):
            boxes = entry.boxes(layout.tensor, rank, layout.padded_rows(entry))
            is_copy = rank > 0 and boxes == (entry.whole(layout.padded_rows(entry)),)
            yield Shard(entry, pipeline_rank, virtual_stage, rank, boxes, is_copy)
    if layout.pipeline > 1:
        for tied in table.module_aliases.values():
            entry = table.entries[tied]
            for rank in range(layout.tensor):
                boxes = entry.boxes(layout.tensor, rank, layout.padded_rows(entry))
                yield Shard(entry, layout.pipeline - 1, layout.virtual - 1, rank, boxes, is_copy=True)


def check_coverage(table: Table, layout: Layout, num_layers: int) -> int:
    """Proves that every element of every Hugging Face tensor has exactly one place, apart from copies.

    Returns:
        The number of elements.

    Raises:
        ValueError: an element has no place or two; names the first such tensor.
    """
    landed: dict[str, dict[Interval, list[Interval]]] = defaultdict(lambda: defaultdict(list))
    for shard in shards(table, layout, num_layers):
        for box in () if shard.is_copy else shard.boxes:
            for copy in shard.entry.sources(box):
                landed[copy.source][copy.box.columns or (0, 1)].append(copy.box.rows)
    for name, origin in table.origins.items():
        num_columns = origin.shape[1] if len(origin.shape) > 1 else 1
        _check_tiles(f"columns of {name}", list(landed[name]), num_columns)
        for rows in landed[name].values():
            _check_tiles(f"rows of {name}", rows, origin.shape[0])
    return sum(origin.shape[0] * (origin.shape[1] if len(origin.shape) > 1 else 1) for origin in table.origins.values())


def _check_tiles(what: str, intervals: list[Interval], length: int) -> None:
    end = 0
    for start, stop in sorted(intervals):
        if start != end:
            raise ValueError(
                f"{what}: {min(start, end)} to {max(start, end)} land {'twice' if start < end else 'nowhere'}"
            )
        end = stop
    if end != length:
        raise ValueError(f"{what}: {end} to {length} land nowhere")
