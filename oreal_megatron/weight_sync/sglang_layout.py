"""Shapes and contents of the parameters of a server's tensor-parallel ranks, in rows of Hugging Face tensors.

SGLang's Llama, Qwen2 and Qwen3 name their parameters like Hugging Face, except that queries, keys and values are one
tensor and gate and up another (`stacked_params_mapping` of its model files). Names and slices only, without torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from oreal_megatron.config import SERVED_BLOCK, GeometryConfig, ParallelConfig, unserved_shapes
from oreal_megatron.config.divisibility import layout_violations
from oreal_megatron.conversion.rules import Box, Copy, Interval, Table

_MERGED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}
LOADER = "oreal_megatron.weight_sync.worker.load"
"""Function that servers are started with as --custom-weight-loader, and the `load_format` of a command."""
CPU_FEED_FORWARD_MULTIPLE = 32
"""Multiple that SGLang pads feed-forward columns to on a CPU (`DEFAULT_MOE_PADDING_SIZE`), and only there."""

_LINEAR = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
_VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True)
class SGLangLayout:
    """A server's split and padding of a model."""

    tensor: int = 1
    """Number of tensor-parallel ranks."""
    vocabulary_multiple: int = 64
    """Multiple that SGLang pads the rows of the vocabulary to (`DEFAULT_VOCAB_PADDING_SIZE`)."""
    feed_forward_multiple: int = 1
    """Multiple that a rank's feed-forward columns are padded to, with zeros; 1 for no padding."""
    fp8: bool = False
    """Whether the weights of linear layers are served in FP8."""

    def check(self, geometry: GeometryConfig) -> None:
        """Raises ValueError, with every reason, if a server cannot hold a model of this geometry in this layout."""
        padded = geometry.model_copy(update={"ffn_hidden_size": self.padded_columns(geometry.ffn_hidden_size)})
        ranks = ParallelConfig(tensor=self.tensor, pipeline=1, micro_batch_tokens=1)
        problems = [violation.remedy for violation in layout_violations(padded, ranks)]
        num_rows = self.padded_rows(geometry.vocab_size or 0)
        if num_rows % self.tensor:
            problems.append(f"{num_rows} rows of the padded vocabulary do not split evenly over {self.tensor} ranks")
        if self.fp8:
            problems += unserved_shapes(geometry, self.tensor)
        if problems:
            raise ValueError(
                f"the model does not split with rollout.sglang.tensor = {self.tensor}: {'; '.join(problems)}"
            )

    def padded_rows(self, vocab_size: int) -> int:
        return _rounded_up(vocab_size, self.vocabulary_multiple)

    def padded_columns(self, ffn_hidden_size: int) -> int:
        if self.feed_forward_multiple == 1:
            return ffn_hidden_size
        return _rounded_up(ffn_hidden_size, self.feed_forward_multiple * self.tensor)


@dataclass(frozen=True)
class ServedTensor:
    """A parameter of a server's tensor-parallel rank, and the Hugging Face rectangles that fill it."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[Copy, ...]
    """Hugging Face rectangles that fill the parameter, by rows; rows of padding have none."""
    is_fp8: bool = False
    """Whether it is served in e4m3, with its scales in a parameter of their own."""

    def parameters(self, dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Returns name -> (dtype, shape) of the parameter, and of its scales if it is in FP8.

        dtype: dtype of parameters that are not in FP8.
        """
        if not self.is_fp8:
            return {self.name: (dtype, self.shape)}
        return {self.name: ("float8_e4m3fn", self.shape), scales_of(self.name): ("float32", self.num_blocks)}

    @property
    def num_blocks(self) -> tuple[int, ...]:
        """Shape of the scales."""
        return tuple(size // SERVED_BLOCK for size in self.shape)

    @property
    def num_elements(self) -> int:
        """Number of elements without padding."""
        return sum(part.box.num_elements for part in self.parts)


def scales_of(name: str) -> str:
    """Returns SGLang's name for the scales of an FP8 weight, by which its e4m3 numbers are multiplied."""
    return f"{name}_scale_inv"


def served_tensors(table: Table, geometry: GeometryConfig, layout: SGLangLayout, rank: int) -> Iterator[ServedTensor]:
    """Yields the parameters of a server's tensor-parallel rank, in the order of a forward pass.

    Tied embeddings are one parameter, as in SGLang.
    """
    merged: dict[str, list[str]] = {}
    for name in table.origins:
        merged.setdefault(_served_name(name), []).append(name)
    for name, sources in merged.items():
        parts, rows = [], 0
        for source in sources:
            whole = table.origins[source].shape
            padded = _padded_box(source, whole, geometry, layout, rank)
            box = Box(_within(padded.rows, whole[0]), padded.columns and _within(padded.columns, whole[1]))
            if box.num_elements:
                parts.append(Copy(source, box, (rows, rows + box.shape[0])))
            rows += padded.shape[0]
        is_fp8 = layout.fp8 and name.endswith(".weight") and name.split(".")[-2] in _LINEAR
        yield ServedTensor(name, (rows, *padded.shape[1:]), tuple(parts), is_fp8)


def whole_tensors(table: Table) -> Iterator[ServedTensor]:
    """Yields every Hugging Face tensor as a parameter that holds all of it."""
    for name, origin in table.origins.items():
        rows, *columns = origin.shape
        box = Box((0, rows), (0, columns[0]) if columns else None)
        yield ServedTensor(name, origin.shape, (Copy(name, box, (0, rows)),))


def _served_name(name: str) -> str:
    module, _, kind = name.rpartition(".")
    parent, _, leaf = module.rpartition(".")
    return f"{parent}.{_MERGED[leaf]}.{kind}" if leaf in _MERGED else name


def _padded_box(name: str, shape: tuple[int, ...], geometry: GeometryConfig, layout: SGLangLayout, rank: int) -> Box:
    """Returns the rectangle of a Hugging Face tensor that a tensor-parallel rank holds, with its padding."""
    leaf = name.split(".")[-2]
    rows: Interval = (0, shape[0])
    columns: Interval | None = (0, shape[1]) if len(shape) > 1 else None
    if name in _VOCABULARY:
        rows = _part(layout.padded_rows(shape[0]), layout.tensor, rank)
    elif leaf in ("k_proj", "v_proj") and layout.tensor > geometry.num_query_groups:
        copies = layout.tensor // geometry.num_query_groups
        rows = _part(shape[0], geometry.num_query_groups, rank // copies)
    elif leaf in ("gate_proj", "up_proj"):
        rows = _part(layout.padded_columns(shape[0]), layout.tensor, rank)
    elif leaf in _MERGED:
        rows = _part(shape[0], layout.tensor, rank)
    elif leaf == "o_proj":
        columns = _part(shape[1], layout.tensor, rank)
    elif leaf == "down_proj":
        columns = _part(layout.padded_columns(shape[1]), layout.tensor, rank)
    return Box(rows, columns)


def _part(length: int, size: int, rank: int) -> Interval:
    return rank * (length // size), (rank + 1) * (length // size)


def _within(interval: Interval, length: int) -> Interval:
    return min(interval[0], length), min(interval[1], length)


def _rounded_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple
