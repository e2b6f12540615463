"""Where tensors lie: which pipeline stage and tensor rank holds what, and the proof that nothing is lost or doubled."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from oreal_megatron.config import GeometryConfig
from oreal_megatron.conversion.rules import Box, Entry, Interval, Table, sizes_of


@dataclass(frozen=True)
class Layout:
    """How a model is split. vocabulary_multiple: rows are padded to a multiple of it and of the tensor ranks."""

    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    """Runs of layers of a pipeline stage; more than 1: interleaved."""
    vocabulary_multiple: int = 1

    @property
    def num_ranks(self) -> int:
        return self.tensor * self.pipeline

    def check(self, geometry: GeometryConfig) -> None:
        """Raises ValueError, with every reason, where a model of this geometry does not split so."""
        groups, sizes = geometry.num_query_groups, sizes_of(geometry)
        tensor = f"over --tensor-parallel {self.tensor} ranks"
        chunks = self.pipeline * self.virtual
        problems = [
            reason
            for is_wrong, reason in (
                (
                    geometry.num_attention_heads % self.tensor,
                    f"{geometry.num_attention_heads} attention heads {tensor}",
                ),
                (
                    groups % self.tensor and self.tensor % groups,
                    f"{groups} query groups {tensor}, nor the ranks over the groups",
                ),
                ((sizes["queries"] + 2 * sizes["keys"]) % self.tensor, f"queries, keys and values {tensor}"),
                (sizes["ffn"] % self.tensor, f"{sizes['ffn']} columns of the feed-forward layers {tensor}"),
                (geometry.num_layers % chunks, self._uneven(geometry.num_layers)),
            )
            if is_wrong
        ]
        if self.virtual > 1 and self.pipeline == 1:
            problems.append(f"--virtual-pipeline {self.virtual}, which needs --pipeline-parallel 2 or more")
        if problems:
            raise ValueError("the model does not split: " + "; ".join(problems))

    def _uneven(self, num_layers: int) -> str:
        virtual = f" x --virtual-pipeline {self.virtual}" if self.virtual > 1 else ""
        return f"{num_layers} layers over --pipeline-parallel {self.pipeline}{virtual} stages"

    def padded_rows(self, entry: Entry) -> int:
        """The tensor's rows with padding."""
        if not entry.is_vocabulary:
            return entry.shape[0]
        multiple = self.vocabulary_multiple * self.tensor
        return -(-entry.shape[0] // multiple) * multiple

    def stage_of(self, entry: Entry, num_layers: int) -> tuple[int, int]:
        """(pipeline rank, virtual stage) that holds the tensor."""
        if entry.layer is None:
            return (0, 0) if entry.name.startswith("embedding.") else (self.pipeline - 1, self.virtual - 1)
        chunk = entry.layer // (num_layers // (self.pipeline * self.virtual))
        return chunk % self.pipeline, chunk // self.pipeline


@dataclass(frozen=True)
class Shard:
    """What one rank holds of one Megatron tensor."""

    entry: Entry
    pipeline_rank: int
    virtual_stage: int
    tensor_rank: int
    boxes: tuple[Box, ...]
    is_copy: bool = False
    """Whether another rank holds the same: replicated over tensor ranks, or the tied embedding of the last stage."""

    @property
    def num_elements(self) -> int:
        return sum(box.num_elements for box in self.boxes)


def shards(table: Table, layout: Layout, num_layers: int) -> Iterator[Shard]:
    """Every rank's part of every tensor, copies included, in the order of a forward pass."""
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
    """Proves that every element of every Hugging Face tensor lands exactly once, copies aside.

    Returns:
        The number of elements.

    Raises:
        ValueError: the first tensor of which an element lands nowhere or twice.
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
