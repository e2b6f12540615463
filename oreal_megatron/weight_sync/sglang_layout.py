"""What a tensor-parallel rank of a rollout server holds, in rows of Hugging Face tensors.

SGLang's Llama, Qwen2 and Qwen3 name their parameters like Hugging Face, except that queries, keys and values are one
tensor and gate and up another (`stacked_params_mapping` of its model files). Names and slices only: no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from oreal_megatron.config import SERVED_BLOCK, GeometryConfig, unserved_shapes
from oreal_megatron.conversion.rules import Box, Copy, Interval, Table

_MERGED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}
LOADER = "oreal_megatron.weight_sync.worker.load"
"""What servers are started with as --custom-weight-loader, and the `load_format` of an order."""
CPU_FEED_FORWARD_MULTIPLE = 32
"""Of SGLang's servers on CPU, and there alone (`DEFAULT_MOE_PADDING_SIZE`)."""

_LINEAR = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
_VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True)
class SGLangLayout:
    """Rollout engines of one kind: how many, and how each is split."""

    count: int = 1
    tensor: int = 1
    vocabulary_multiple: int = 64
    """Rows that SGLang pads the vocabulary to a multiple of (`DEFAULT_VOCAB_PADDING_SIZE`)."""
    feed_forward_multiple: int = 1
    """Feed-forward columns that a rank's share is padded to a multiple of, with zeros; 1: it is not padded."""
    fp8: bool = False
    """The weights of linear layers are served in FP8."""

    def check(self, geometry: GeometryConfig) -> None:
        """Raises ValueError, with every reason, where an engine cannot serve a model of this geometry so."""
        groups = geometry.num_query_groups
        over = f"over an engine's {self.tensor} tensor-parallel ranks"
        problems = [
            reason
            for is_wrong, reason in (
                (geometry.num_attention_heads % self.tensor, f"{geometry.num_attention_heads} attention heads {over}"),
                (groups % self.tensor and self.tensor % groups, f"{groups} key-value heads {over}, nor copies of them"),
                (
                    self.padded_columns(geometry.ffn_hidden_size) % self.tensor,
                    f"{geometry.ffn_hidden_size} feed-forward columns {over}",
                ),
                (self.padded_rows(geometry.vocab_size or 0) % self.tensor, f"the padded vocabulary {over}"),
            )
            if is_wrong
        ]
        if self.fp8:
            problems += unserved_shapes(geometry, self.tensor)
        if problems:
            raise ValueError("the model does not split: " + "; ".join(problems))

    def padded_rows(self, vocab_size: int) -> int:
        return _rounded_up(vocab_size, self.vocabulary_multiple)

    def padded_columns(self, ffn_hidden_size: int) -> int:
        if self.feed_forward_multiple == 1:
            return ffn_hidden_size
        return _rounded_up(ffn_hidden_size, self.feed_forward_multiple * self.tensor)


@dataclass(frozen=True)
class ServedTensor:
    """One parameter of one rank of an engine."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[Copy, ...]
    """The Hugging Face rectangles that make it up, by rows; rows of padding have none."""
    is_fp8: bool = False
    """It is served in e4m3, beside a tensor of scales."""

    def held(self, dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """What a server holds of it: name -> (dtype, shape). dtype: of what is not in FP8."""
        if not self.is_fp8:
            return {self.name: (dtype, self.shape)}
        return {self.name: ("float8_e4m3fn", self.shape), scales_of(self.name): ("float32", self.num_blocks)}

    @property
    def num_blocks(self) -> tuple[int, ...]:
        """The shape of its scales."""
        return tuple(size // SERVED_BLOCK for size in self.shape)

    @property
    def num_elements(self) -> int:
        """Without padding."""
        return sum(part.box.num_elements for part in self.parts)


def scales_of(name: str) -> str:
    """SGLang's name for the scales of an FP8 weight: what e4m3 numbers are multiplied by."""
    return f"{name}_scale_inv"


def served_tensors(table: Table, geometry: GeometryConfig, layout: SGLangLayout, rank: int) -> Iterator[ServedTensor]:
    """The parameters of rank `rank` of an engine, in the order of a forward pass.

    Tied embeddings are one parameter, as in SGLang.
    """
    merged: dict[str, list[str]] = {}
    for name in table.origins:
        merged.setdefault(_served_name(name), []).append(name)
    for name, sources in merged.items():
        parts, rows = [], 0
        for source in sources:
            whole = table.origins[source].shape
            held = _held(source, whole, geometry, layout, rank)
            box = Box(_within(held.rows, whole[0]), held.columns and _within(held.columns, whole[1]))
            if box.num_elements:
                parts.append(Copy(source, box, (rows, rows + box.shape[0])))
            rows += held.shape[0]
        is_fp8 = layout.fp8 and name.endswith(".weight") and name.split(".")[-2] in _LINEAR
        yield ServedTensor(name, (rows, *held.shape[1:]), tuple(parts), is_fp8)


def whole_tensors(table: Table) -> Iterator[ServedTensor]:
    """Every tensor as Hugging Face has it: for who holds whole copies."""
    for name, origin in table.origins.items():
        rows, *columns = origin.shape
        box = Box((0, rows), (0, columns[0]) if columns else None)
        yield ServedTensor(name, origin.shape, (Copy(name, box, (0, rows)),))


def _served_name(name: str) -> str:
    module, _, kind = name.rpartition(".")
    parent, _, leaf = module.rpartition(".")
    return f"{parent}.{_MERGED[leaf]}.{kind}" if leaf in _MERGED else name


def _held(name: str, shape: tuple[int, ...], geometry: GeometryConfig, layout: SGLangLayout, rank: int) -> Box:
    """What rank `rank` holds of a Hugging Face tensor, padding included."""
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
