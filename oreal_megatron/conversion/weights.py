"""Weights of a Hugging Face directory (safetensors, sharded or not): read as slices, written as a stream."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from oreal_megatron.conversion.rules import Box, Table

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NAME_OF = {dtype: name for name, dtype in DTYPES.items()}
# Buffers that are in old checkpoints; models compute them.
_IGNORED = "rotary_emb.inv_freq"
_SHOWN = 6


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as described in the header of its shard."""

    file: str
    shape: tuple[int, ...]
    dtype: str


class HuggingFaceWeights:
    """The tensors of a directory. Files are mapped, so that reading a slice reads only its pages."""

    def __init__(self, path: Path):
        """Opens every shard and checks it against the index.

        Raises:
            ValueError: there are no weights, a shard is missing or damaged, or the index disagrees with the shards.
        """
        self.path = path
        listed = self._listed_files()
        if lacking := sorted(name for name in set(listed.values()) if not (path / name).is_file()):
            raise ValueError(f"{path}: {INDEX} names shards that are missing: {shorten(lacking)}")
        self._files: dict[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for name in sorted(set(listed.values())) if listed else [SINGLE]:
            self._open(name)
        if listed:
            self._compare_with_index(listed)

    def _listed_files(self) -> dict[str, str]:
        """Returns tensor name -> file from the index; empty if there is a single file."""
        if not self.path.is_dir():
            raise ValueError(f"{self.path} is not a directory with weights")
        if (index := self.path / INDEX).is_file():
            try:
                return dict(json.loads(index.read_text())["weight_map"])
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(f"{index} is not an index of safetensors shards: {error!r}") from error
        if not (self.path / SINGLE).is_file():
            others = sorted(file.name for file in self.path.glob("*.bin"))
            hint = f" ({others[0]} is in torch's format: save the model as safetensors)" if others else ""
            raise ValueError(f"{self.path}: the directory has neither {INDEX} nor {SINGLE}{hint}")
        return {}

    def _open(self, name: str) -> None:
        file = self.path / name
        try:
            # Opening checks the header, and that the file has the size that the header says.
            opened = safe_open(file, "pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is truncated or not a safetensors file: {error}") from error
        self._files[name] = opened
        for tensor in opened.keys():  # noqa: SIM118 (not a dict)
            described = opened.get_slice(tensor)
            if tensor in self.tensors:
                raise ValueError(f"{self.path}: {tensor} is in both {self.tensors[tensor].file} and {name}")
            if not tensor.endswith(_IGNORED):
                self.tensors[tensor] = TensorInfo(name, tuple(described.get_shape()), described.get_dtype())

    def _compare_with_index(self, listed: Mapping[str, str]) -> None:
        places = {tensor: f"in {info.file}" for tensor, info in self.tensors.items()}
        problems = [
            f"{tensor} is listed in {file}, and is {places.get(tensor, 'nowhere')}"
            for tensor, file in sorted(listed.items())
            if not tensor.endswith(_IGNORED) and places.get(tensor) != f"in {file}"
        ]
        problems += [
            f"{tensor} is in {info.file}, and is not listed"
            for tensor, info in sorted(self.tensors.items())
            if tensor not in listed
        ]
        if problems:
            raise ValueError(f"{self.path}: {INDEX} disagrees with the shards: {shorten(problems, '; ')}")

    def check(self, table: Table) -> None:
        """Compares names, shapes and dtypes with the model's.

        Raises:
            ValueError: tensors are missing, unexpected or of another shape or dtype, or tied tensors differ; lists all
                problems.
        """
        problems = [f"{name} is missing" for name in table.origins if name not in self.tensors]
        for name, info in self.tensors.items():
            origin = table.origins.get(table.aliases.get(name, name))
            if origin is None:
                problems.append(f"{name} ({info.file}) is unexpected")
            elif origin.shape != info.shape:
                problems.append(
                    f"{name} ({info.file}) has shape {list(info.shape)}, config.json says {list(origin.shape)}"
                )
            elif info.dtype not in DTYPES:
                problems.append(f"{name} ({info.file}) has dtype {info.dtype}, supported are {', '.join(DTYPES)}")
        for entry in table.entries.values():
            dtypes = {self.tensors[run.tensor].dtype: run.tensor for run in entry.runs if run.tensor in self.tensors}
            if len(dtypes) > 1:
                parts = " and ".join(f"{tensor} ({dtype})" for dtype, tensor in dtypes.items())
                problems.append(f"{parts} become one Megatron tensor and differ in dtype")
        if problems:
            raise ValueError(f"{self.path} does not hold the model of its config.json: {shorten(problems, '; ')}")
        for alias, name in table.aliases.items():
            if alias in self.tensors and not self._are_equal(alias, name):
                raise ValueError(
                    f"{self.path}: config.json ties {alias} to {name} (tie_word_embeddings), but they differ. Set "
                    "tie_word_embeddings to false, or remove the wrong tensor."
                )

    def _are_equal(self, one: str, other: str) -> bool:
        if self.tensors[one].dtype != self.tensors[other].dtype:
            return False
        rows, columns = self.tensors[one].shape
        blocks = (Box((start, min(start + 4096, rows)), (0, columns)) for start in range(0, rows, 4096))
        return all(same_bits(self.read(one, box), self.read(other, box)) for box in blocks)

    def dtype(self, name: str) -> torch.dtype:
        """Returns the dtype of a tensor of a checked directory."""
        return DTYPES[self.tensors[name].dtype]

    def read(self, name: str, box: Box) -> Tensor:
        """Returns a rectangle of a tensor, as a view of the mapped file."""
        rows = slice(*box.rows)
        described = self._files[self.tensors[name].file].get_slice(name)
        return described[rows] if box.columns is None else described[rows, slice(*box.columns)]

    def stamp(self) -> dict[str, list[int]]:
        """Returns sizes and times of the files, by which a later run recognises the same input."""
        stats = {name: (self.path / name).stat() for name in self._files}
        return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


@dataclass(frozen=True)
class NewShard:
    """A safetensors file to be written."""

    file: str
    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    """Name -> (shape, dtype), in the order of the file."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors."""
        return sum(num_bytes(shape, dtype) for shape, dtype in self.tensors.values())

    def header(self) -> bytes:
        """Returns the bytes before the tensors: the length of a JSON description, and the description."""
        described: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, (shape, dtype) in self.tensors.items():
            start, end = end, end + num_bytes(shape, dtype)
            described[name] = {"dtype": _NAME_OF[dtype], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(described, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


def plan_shards(
    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]], max_shard_bytes: int
) -> tuple[list[NewShard], str | None]:
    """Returns files of at most `max_shard_bytes` (more if a tensor is larger), and the index if there are several."""
    groups: list[dict[str, tuple[tuple[int, ...], torch.dtype]]] = [{}]
    size = 0
    for name, (shape, dtype) in tensors.items():
        more = num_bytes(shape, dtype)
        if groups[-1] and size + more > max_shard_bytes:
            groups.append({})
            size = 0
        groups[-1][name] = (shape, dtype)
        size += more
    if len(groups) == 1:
        return [NewShard(SINGLE, groups[0])], None
    names = [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    shards = [NewShard(name, group) for name, group in zip(names, groups, strict=True)]
    index = {
        "metadata": {"total_size": sum(shard.num_bytes for shard in shards)},
        "weight_map": {tensor: shard.file for shard in shards for tensor in shard.tensors},
    }
    return shards, json.dumps(index, indent=2, sort_keys=True) + "\n"


def num_bytes(shape: Iterable[int], dtype: torch.dtype) -> int:
    """Returns the bytes of a dense tensor."""
    return torch.Size(shape).numel() * dtype.itemsize


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Returns whether two tensors of a dtype are equal bit for bit: NaNs may be equal, and 0 is not -0."""
    as_bits = {2: torch.int16, 4: torch.int32}[one.dtype.itemsize]
    return one.dtype == other.dtype and torch.equal(one.view(as_bits), other.view(as_bits))


def shorten(items: list[str], separator: str = ", ") -> str:
    """Joins the first few items, and says how many more there are."""
    more = f"{separator}and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return separator.join(items[:_SHOWN]) + more
