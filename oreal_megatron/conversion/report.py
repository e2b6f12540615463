"""A report of a conversion from config.json alone: places of tensors, bytes of each rank, peak memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from oreal_megatron.conversion.huggingface import HuggingFaceModel
from oreal_megatron.conversion.layout import Layout, Shard, check_coverage, shards
from oreal_megatron.conversion.rules import Entry

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_SHOWN_RANKS = 64


@dataclass(frozen=True)
class ConversionPlan:
    """The shards of every rank; every element of the source was checked to have exactly one place."""

    model: HuggingFaceModel
    layout: Layout
    num_elements: int
    """Number of elements of the source."""
    shards: Mapping[tuple[int, int], Sequence[Shard]]
    """Shards by (pipeline rank, tensor rank), copies included."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the source."""
        return self.num_elements * BYTES[self.model.dtype]

    @property
    def num_tensors(self) -> int:
        """Number of tensors of the source."""
        return len(self.model.table.origins)

    def lines(self, *, peak_bytes: int) -> Iterator[str]:
        """Yields the plan as text. peak_bytes: bytes of the buffers of a conversion."""
        model = self.model
        yield (
            f"{model.path}: {model.family.architectures[model.head]}, {self.num_elements / 1e9:.3f}B parameters in "
            f"{self.num_tensors} tensors, {gigabytes(self.num_bytes)} in {model.dtype}"
        )
        yield from self._tensor_lines()
        yield f"\n{'rank':<14} {'layers':<24} {'tensors':>8} {'bytes':>18}  largest tensor"
        width = BYTES[model.dtype]
        for (pipeline_rank, tensor_rank), rank_shards in list(self.shards.items())[:_SHOWN_RANKS]:
            name = f"pp{pipeline_rank} tp{tensor_rank}"
            layers = sorted({shard.entry.layer for shard in rank_shards if shard.entry.layer is not None})
            num_bytes = width * sum(shard.num_elements for shard in rank_shards)
            largest = max(rank_shards, key=lambda shard: shard.num_elements)
            yield (
                f"{name:<14} {_ranges(layers):<24} {len(rank_shards):>8} {num_bytes:>18,}  {largest.entry.name} "
                f"({width * largest.num_elements:,})"
            )
        if len(self.shards) > _SHOWN_RANKS:
            yield f"... and {len(self.shards) - _SHOWN_RANKS} more ranks"
        yield f"\nevery one of {self.num_elements:,} elements lands exactly once; peak buffers {gigabytes(peak_bytes)}"

    def _tensor_lines(self) -> Iterator[str]:
        model, layout = self.model, self.layout
        yield f"\n{'Megatron tensor':<58} {'shape':<18} {'a tensor rank holds':<28} Hugging Face tensors"
        for entry in _first_of_each_kind(model):
            names = dict.fromkeys(run.tensor for run in entry.runs)
            shown = [_as_pattern(name, entry.layer) for name in (entry.name, *names)]
            shape = "x".join(map(str, (layout.padded_rows(entry), *entry.shape[1:])))
            yield f"{shown[0]:<58} {shape:<18} {entry.split.value:<28} {', '.join(shown[1:])}"
        for alias, name in model.table.aliases.items():
            yield f"{'(tied)':<58} {'':<18} {'':<28} {alias} is {name}"
        for entry in (entry for entry in model.table.entries.values() if entry.is_vocabulary):
            if padding := layout.padded_rows(entry) - entry.shape[0]:
                yield f"{entry.name}: {padding} rows of zeros behind the vocabulary's {entry.shape[0]}"


def plan(model: HuggingFaceModel, layout: Layout) -> ConversionPlan:
    """Plans a conversion.

    Raises:
        ValueError: the model does not split in this layout, or an element would have no place or two.
    """
    if model.dtype not in BYTES:
        raise ValueError(f"{model.path}: dtype {model.dtype!r} is not supported, only {', '.join(BYTES)}")
    layout.check(model.geometry)
    num_layers, table = model.geometry.num_layers, model.table
    num_elements = check_coverage(table, layout, num_layers)
    by_rank: dict[tuple[int, int], list[Shard]] = defaultdict(list)
    for shard in shards(table, layout, num_layers):
        by_rank[shard.pipeline_rank, shard.tensor_rank].append(shard)
    return ConversionPlan(model, layout, num_elements, dict(sorted(by_rank.items())))


def _first_of_each_kind(model: HuggingFaceModel) -> list[Entry]:
    return [entry for entry in model.table.entries.values() if not entry.layer]


def _as_pattern(name: str, layer: int | None) -> str:
    return name if layer is None else name.replace(f".layers.{layer}.", ".layers.*.")


def _ranges(numbers: Sequence[int]) -> str:
    """Formats sorted numbers as ranges, for example 0-3, 8-11."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def gigabytes(num_bytes: int) -> str:
    """Formats a number of bytes in GB (10^9 bytes)."""
    return f"{num_bytes / 1e9:.2f} GB"
