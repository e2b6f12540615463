"""Converts whole checkpoints from one format into the other, block by block, and compares two checkpoints."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oreal_megatron.conversion.distributed_checkpoint import Chunk, DistributedWeights, write_chunk, write_tables
from oreal_megatron.conversion.families.decoder import Head
from oreal_megatron.conversion.huggingface import HuggingFaceModel, read_model, with_scalar_head
from oreal_megatron.conversion.layout import Layout, check_coverage, shards
from oreal_megatron.conversion.naming import stored_names
from oreal_megatron.conversion.output import OutputDirectory, copy_beside, explained, new_file
from oreal_megatron.conversion.rules import Box, Entry
from oreal_megatron.conversion.weights import (
    INDEX,
    HuggingFaceWeights,
    NewShard,
    num_bytes,
    plan_shards,
    same_bits,
    shorten,
)
from oreal_megatron.files import write_atomically

BLOCK_BYTES = 64 * 2**20
"""Bytes of the buffer; larger rectangles are converted in blocks of rows."""
FILE_BYTES = 2 * 2**30
"""Bytes of a file of a Megatron checkpoint, which is the most that a killed conversion has to repeat."""
SHARD_BYTES = 5 * 10**9
"""Bytes of a file of a Hugging Face directory, as in transformers."""
ASSETS = "huggingface"
"""Directory within a Megatron checkpoint that has config.json, tokenizer and chat template unchanged."""
WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".gguf", INDEX, "pytorch_model.bin.index.json")
"""Suffixes of files that hold weights."""

Advance = Callable[[int], None]
"""Function that is called with the number of bytes of every block that is done."""


def _silent(num_bytes: int) -> None:
    pass


@dataclass(frozen=True)
class Block:
    """A rectangle of a Megatron tensor that becomes a chunk on disk."""

    entry: Entry
    key: str
    layer: int | None
    """Index in the stacked tensor; None if layers are not stacked."""
    box: Box
    dtype: torch.dtype

    @property
    def offsets(self) -> tuple[int, ...]:
        corner = (self.box.rows[0],) if self.box.columns is None else (self.box.rows[0], self.box.columns[0])
        return corner if self.layer is None else (self.layer, *corner)

    @property
    def num_bytes(self) -> int:
        return num_bytes(self.box.shape, self.dtype)


def to_megatron(source: Path, target: Path, layout: Layout, *, advance: Advance = _silent) -> None:
    """Converts a Hugging Face directory into a Megatron distributed checkpoint, cut as the ranks of `layout` read it.

    Megatron-Core's own loader loads it in any layout. Files that are not weights are copied to `huggingface/` in it.

    Raises:
        ValueError: the source is damaged or not supported, the layout does not split it, or the target is not empty.
        OSError: a file could not be written; the target does not exist.
    """
    model = read_model(source)
    layout.check(model.geometry)
    weights = HuggingFaceWeights(source)
    weights.check(model.table)
    check_coverage(model.table, layout, model.geometry.num_layers)
    blocks = _blocks(model, weights, layout)
    files = _into_files(blocks)
    output = OutputDirectory(target)
    total = sum(block.num_bytes for group in files.values() for block in group)
    output.open({"files": weights.stamp(), "layout": asdict(layout), "block": BLOCK_BYTES}, total)
    try:
        chunks = [
            chunk
            for name, group in files.items()
            for chunk in _write_megatron_file(output.partial / name, group, weights, advance)
        ]
        assets = output.partial / ASSETS
        assets.mkdir(exist_ok=True)
        copy_beside(source, assets, without=WEIGHTS)
        stored = {
            block.key: (_stored_shape(block, layout, model.geometry.num_layers), block.dtype)
            for group in files.values()
            for block in group
        }
        write_tables(output.partial, stored, chunks, model.geometry.num_layers)
        for name in files:
            _note_of(output.partial / name).unlink()
        output.commit()
    except OSError as error:
        raise explained(error, target) from error


def _blocks(model: HuggingFaceModel, weights: HuggingFaceWeights, layout: Layout) -> dict[int, list[Block]]:
    """Returns the blocks that each model rank (tensor ranks fastest) writes, in order."""
    by_rank: dict[int, list[Block]] = defaultdict(list)
    dtypes: dict[str, tuple[torch.dtype, str]] = {}
    for shard in shards(model.table, layout, model.geometry.num_layers):
        if shard.is_copy:
            continue
        entry = shard.entry
        key, is_stacked = stored_names(entry.name)[0]
        dtype = weights.dtype(entry.runs[0].tensor)
        first_dtype, first = dtypes.setdefault(key, (dtype, entry.runs[0].tensor))
        if dtype != first_dtype:
            raise ValueError(
                f"{weights.path}: {first} is {first_dtype} and {entry.runs[0].tensor} is {dtype}. Megatron stacks them "
                "in one tensor, so they must have the same dtype."
            )
        layer = entry.layer if is_stacked else None
        by_rank[shard.pipeline_rank * layout.tensor + shard.tensor_rank] += [
            Block(entry, key, layer, part, dtype) for box in shard.boxes for part in in_blocks(box, dtype)
        ]
    return by_rank


def in_blocks(box: Box, dtype: torch.dtype) -> Iterator[Box]:
    """Splits a rectangle into runs of rows of at most BLOCK_BYTES."""
    row_bytes = num_bytes(box.shape[1:], dtype)
    step = max(BLOCK_BYTES // row_bytes, 1)
    for start in range(*box.rows, step):
        yield Box((start, min(start + step, box.rows[1])), box.columns)


def _into_files(by_rank: dict[int, list[Block]]) -> dict[str, list[Block]]:
    """Returns the blocks of each file, by name: several files a rank, none much larger than FILE_BYTES."""
    files: dict[str, list[Block]] = {}
    for rank, blocks in sorted(by_rank.items()):
        number, size = 0, 0
        for block in blocks:
            if size and size + block.num_bytes > FILE_BYTES:
                number, size = number + 1, 0
            files.setdefault(f"__{rank}_{number}.distcp", []).append(block)
            size += block.num_bytes
    return files


def _write_megatron_file(
    path: Path, blocks: Sequence[Block], weights: HuggingFaceWeights, advance: Advance
) -> list[Chunk]:
    """Writes a file and then a note of its chunks; if both are there, an earlier run has completed the file."""
    note = _note_of(path)
    if path.is_file() and note.is_file():
        advance(sum(block.num_bytes for block in blocks))
        return [Chunk(**{**item, "offsets": tuple(item["offsets"]), "sizes": tuple(item["sizes"])})
                for item in json.loads(note.read_text())]  # fmt: skip
    written = []
    with new_file(path) as stream:
        for block in blocks:
            tensor = _filled(block, weights)
            shaped = tensor if block.layer is None else tensor.unsqueeze(0)
            written.append(write_chunk(stream, path.name, block.key, block.offsets, shaped))
            advance(tensor.nbytes)
    write_atomically(note, json.dumps([asdict(item) for item in written]))
    return written


def _note_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.json")


def _filled(block: Block, weights: HuggingFaceWeights) -> Tensor:
    """Reads the elements of a block from the source tensors; rows of padding are zeros."""
    copies = list(block.entry.sources(block.box))
    num_rows = block.box.shape[0]
    if len(copies) == 1 and copies[0].at == (0, num_rows):
        source = weights.read(copies[0].source, copies[0].box)
        if source.is_contiguous():
            return _alone(source)
    is_padded = sum(copy.at[1] - copy.at[0] for copy in copies) < num_rows
    out = (torch.zeros if is_padded else torch.empty)(block.box.shape, dtype=block.dtype)
    for copy in copies:
        out[slice(*copy.at)].copy_(weights.read(copy.source, copy.box))
    return out


def _alone(view: Tensor) -> Tensor:
    """Returns the view with a storage of its own extent, without a copy: torch.save writes whole storages."""
    data = torch.frombuffer(view.view(torch.uint8).numpy(), dtype=torch.uint8)
    return data.view(view.dtype).view(view.shape)


def _stored_shape(block: Block, layout: Layout, num_layers: int) -> tuple[int, ...]:
    shape = (layout.padded_rows(block.entry), *block.entry.shape[1:])
    return shape if block.layer is None else (num_layers, *shape)


@dataclass(frozen=True)
class Export:
    """A Hugging Face directory to be written from a model of a Megatron checkpoint, file by file.

    Several processes may share the work: each plans the same export and writes some of `shards`; one process opens and
    commits the directory.
    """

    weights: DistributedWeights
    model: HuggingFaceModel
    output: OutputDirectory
    shards: tuple[NewShard, ...]
    index: str | None
    assets: Path

    @classmethod
    def plan(
        cls, source: Path, target: Path, *, prefix: str = "", head: Head | None = None, assets: Path | None = None
    ) -> Export:
        """Checks the checkpoint against the model that `assets` describes, and plans the files.

        prefix: prefix of the model's keys. head: head of the model; None for the head that config.json names. assets:
        directory with config.json and tokenizer; None for the directory that `to_megatron` put into the checkpoint.

        Raises:
            ValueError: the checkpoint does not hold that model or cannot be read.
        """
        assets = assets or source / ASSETS
        model = read_model(assets)
        if head is not None and head != model.head:
            if head == "causal":
                raise ValueError(f"{assets}/config.json describes a reward model, which has no output layer")
            model = replace(model, head=head, config=with_scalar_head(model.config))
        weights = DistributedWeights(source, prefix)
        weights.check(model.table)
        tensors = {
            name: (origin.shape, weights.tensors[origin.runs[0].tensor].dtype)
            for name, origin in model.table.origins.items()
        }
        shards, index = plan_shards(tensors, SHARD_BYTES)
        return cls(weights, model, OutputDirectory(target), tuple(shards), index, assets)

    @property
    def num_bytes(self) -> int:
        return sum(shard.num_bytes for shard in self.shards)

    def open(self) -> None:
        """Prepares the directory. Raises ValueError if the target is not empty or the disk has too little space."""
        made_from = {"files": self.weights.stamp(), "prefix": self.weights.prefix, "config": dict(self.model.config)}
        self.output.open(made_from, self.num_bytes)

    def write(self, shard: NewShard, advance: Advance = _silent) -> None:
        """Writes a file, unless an earlier, killed run has completed it."""
        path = self.output.partial / shard.file
        if path.is_file():
            advance(shard.num_bytes)
            return
        try:
            with new_file(path) as stream:
                stream.write(shard.header())
                for name, (_, dtype) in shard.tensors.items():
                    for box in in_blocks(_whole(shard.tensors[name][0]), dtype):
                        block = self._bytes(name, box, dtype)
                        stream.write(block.numpy().data.cast("B"))
                        advance(block.nbytes)
        except OSError as error:
            raise explained(error, self.output.target) from error

    def _bytes(self, name: str, box: Box, dtype: torch.dtype) -> Tensor:
        copies = list(self.model.table.origins[name].sources(box))
        if len(copies) == 1 and (mapped := self.weights.in_one_piece(copies[0].source, copies[0].box)) is not None:
            return mapped
        out = torch.empty(box.shape, dtype=dtype)
        for copy in copies:
            self.weights.read_into(out[slice(*copy.at)], copy.source, copy.box)
        return out.view(torch.uint8)

    def commit(self) -> None:
        """Writes the files that are not weights, and gives the directory its name."""
        partial = self.output.partial
        try:
            copy_beside(self.assets, partial, without=(*WEIGHTS, "config.json") if self._has_new_config() else WEIGHTS)
            if self._has_new_config():
                write_atomically(partial / "config.json", json.dumps(self._config(), indent=2) + "\n")
            if self.index is not None:
                write_atomically(partial / INDEX, self.index)
            self.output.commit()
        except OSError as error:
            raise explained(error, self.output.target) from error

    def _has_new_config(self) -> bool:
        return self._config() != json.loads((self.assets / "config.json").read_text())

    def _config(self) -> dict[str, Any]:
        """Returns the content of config.json with the dtype of the weights."""
        config = dict(self.model.config)
        dtype = str(self.weights.tensors["embedding.word_embeddings.weight"].dtype).removeprefix("torch.")
        if self.model.dtype != dtype:
            config["dtype" if "dtype" in config else "torch_dtype"] = dtype
        return config


def to_huggingface(
    source: Path,
    target: Path,
    *,
    prefix: str = "",
    head: Head | None = None,
    assets: Path | None = None,
    advance: Advance = _silent,
) -> None:
    """Converts a model of a Megatron distributed checkpoint into a Hugging Face directory.

    Arguments are those of `Export.plan`.

    Raises:
        ValueError: the checkpoint is damaged or holds another model, or the target is not empty.
        OSError: a file could not be written; the target does not exist.
    """
    export = Export.plan(source, target, prefix=prefix, head=head, assets=assets)
    export.open()
    for shard in export.shards:
        export.write(shard, advance)
    export.commit()


def _whole(shape: tuple[int, ...]) -> Box:
    return Box((0, shape[0]), None if len(shape) == 1 else (0, shape[1]))


def compare(huggingface: Path, megatron: Path, *, prefix: str = "", advance: Advance = _silent) -> dict[str, str]:
    """Compares two checkpoints of a model bit for bit, block by block; padding must be rows of zeros.

    Returns:
        The difference, as text, of each Megatron tensor that differs, by name.

    Raises:
        ValueError: a checkpoint is damaged, or they hold different models.
    """
    model = read_model(huggingface)
    source = HuggingFaceWeights(huggingface)
    source.check(model.table)
    stored = DistributedWeights(megatron, prefix)
    stored.check(model.table)
    differences = {}
    for entry in model.table.entries.values():
        dtype = source.dtype(entry.runs[0].tensor)
        found = stored.tensors[entry.name]
        if found.dtype != dtype:
            differences[entry.name] = f"{found.dtype}, and {dtype} in {huggingface}"
            continue
        num_different, first = 0, ""
        for box in in_blocks(entry.whole(found.shape[0]), dtype):
            expected = _filled(Block(entry, entry.name, None, box, dtype), source)
            actual = torch.empty_like(expected)
            stored.read_into(actual, entry.name, box)
            if not same_bits(actual, expected):
                where = (actual != expected) | (actual.isnan() | expected.isnan())
                num_different += max(int(where.sum()), 1)
                first = first or f"block of rows {box.rows[0]} to {box.rows[1]}"
            advance(actual.nbytes)
        if num_different:
            names = shorten(sorted({run.tensor for run in entry.runs}))
            differences[entry.name] = f"{num_different} elements differ from {names}, the first in its {first}"
    return differences
