"""What a conversion would do: which tensor goes where, bytes a rank, peak memory. Needs config.json alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from oreal_megatron.conversion.huggingface import HuggingFaceModel
from oreal_megatron.conversion.layout import Layout, check_coverage, shards
from oreal_megatron.conversion.rules import Entry

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_SHOWN_RANKS = 64


@dataclass(frozen=True)
class RankPlan:
    """What one model rank holds."""

    pipeline_rank: int
    tensor_rank: int
    layers: tuple[int, ...]
    num_tensors: int
    num_bytes: int
    """Of its weights in the directory's dtype, replicated and tied ones included."""
    largest: str
    largest_bytes: int


@dataclass(frozen=True)
class ConversionPlan:
    """The whole of it; every element of the source was checked to land exactly once."""

    model: HuggingFaceModel
    layout: Layout
    num_elements: int
    num_bytes: int
    """Of the source."""
    num_tensors: int
    """Of the source."""
    ranks: tuple[RankPlan, ...]

    def lines(self, *, peak_bytes: int) -> Iterator[str]:
        """The plan as text. peak_bytes: buffers of a conversion."""
        model, layout = self.model, self.layout
        yield (
            f"{model.path}: {model.family.architectures[model.head]}, {self.num_elements / 1e9:.3f}B parameters in "
            f"{self.num_tensors} tensors, {gigabytes(self.num_bytes)} in {model.dtype}"
        )
        yield f"\n{'Megatron tensor':<58} {'shape':<18} {'a tensor rank holds':<28} Hugging Face tensors"
        for entry in _first_of_each_kind(model):
            names = sorted({run.tensor for run in entry.runs}, key=[run.tensor for run in entry.runs].index)
            shown = [_as_pattern(name, entry.layer) for name in (entry.name, *names)]
            shape = "x".join(map(str, (layout.padded_rows(entry), *entry.shape[1:])))
            yield f"{shown[0]:<58} {shape:<18} {entry.split.value:<28} {', '.join(shown[1:])}"
        for alias, name in model.table.aliases.items():
            yield f"{'(tied)':<58} {'':<18} {'':<28} {alias} is {name}"
        for entry in (entry for entry in model.table.entries.values() if entry.is_vocabulary):
            if padding := layout.padded_rows(entry) - entry.shape[0]:
                yield f"{entry.name}: {padding} rows of zeros behind the vocabulary's {entry.shape[0]}"
        yield f"\n{'rank':<14} {'layers':<24} {'tensors':>8} {'bytes':>18}  largest tensor"
        for rank in self.ranks[:_SHOWN_RANKS]:
            name = f"pp{rank.pipeline_rank} tp{rank.tensor_rank}"
            yield (
                f"{name:<14} {_ranges(rank.layers):<24} {rank.num_tensors:>8} {rank.num_bytes:>18,}  {rank.largest} "
                f"({rank.largest_bytes:,})"
            )
        if len(self.ranks) > _SHOWN_RANKS:
            yield f"... and {len(self.ranks) - _SHOWN_RANKS} more ranks"
        yield f"\nevery one of {self.num_elements:,} elements lands exactly once; peak buffers {gigabytes(peak_bytes)}"


def plan(model: HuggingFaceModel, layout: Layout) -> ConversionPlan:
    """Plans a conversion.

    Raises:
        ValueError: the model does not split so, or an element would land nowhere or twice.
    """
    if model.dtype not in BYTES:
        raise ValueError(f"{model.path}: dtype {model.dtype!r} is not supported, only {', '.join(BYTES)}")
    layout.check(model.geometry)
    num_layers, table, width = model.geometry.num_layers, model.table, BYTES[model.dtype]
    num_elements = check_coverage(table, layout, num_layers)
    held: dict[tuple[int, int], dict[str, int]] = defaultdict(dict)
    layers: dict[tuple[int, int], set[int]] = defaultdict(set)
    for shard in shards(table, layout, num_layers):
        rank = (shard.pipeline_rank, shard.tensor_rank)
        # The last stage's copy of a tied embedding is a parameter of its own.
        name = shard.entry.name if shard.entry.name not in held[rank] else f"{shard.entry.name} (tied)"
        held[rank][name] = shard.num_elements * width
        if shard.entry.layer is not None:
            layers[rank].add(shard.entry.layer)
    ranks = tuple(
        RankPlan(*rank, tuple(sorted(layers[rank])), len(tensors), sum(tensors.values()), *_largest(tensors))
        for rank, tensors in sorted(held.items())
    )
    return ConversionPlan(model, layout, num_elements, num_elements * width, len(table.origins), ranks)


def _largest(tensors: Mapping[str, int]) -> tuple[str, int]:
    return max(tensors.items(), key=lambda item: item[1])


def _first_of_each_kind(model: HuggingFaceModel) -> list[Entry]:
    return [entry for entry in model.table.entries.values() if not entry.layer]


def _as_pattern(name: str, layer: int | None) -> str:
    return name if layer is None else name.replace(f".layers.{layer}.", ".layers.*.")


def _ranges(numbers: tuple[int, ...]) -> str:
    """0-3, 8-11"""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB"
