"""Megatron's distributed checkpoint format (torch_dist), read and written without Megatron and without processes.

A directory of `*.distcp` files, each a row of torch.save archives; `.metadata`, torch.distributed.checkpoint's table of
which rectangle of which tensor lies where; `common.pt` and `metadata.json`, Megatron-Core's. Layers of one kind are
stacked: `decoder.layers.mlp.linear_fc2.weight` is [layers, rows, columns].
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from oreal_megatron.conversion.naming import stored_names
from oreal_megatron.conversion.rules import Box, Interval, Table, overlap
from oreal_megatron.conversion.weights import num_bytes as num_bytes_of
from oreal_megatron.conversion.weights import shorten
from oreal_megatron.files import write_atomically

_BACKENDS = {"sharded_backend": "torch_dist", "sharded_backend_version": 1,
             "common_backend": "torch", "common_backend_version": 1}  # fmt: skip
# Modules whose extra state Megatron-Core's loaders ask for: FP8 statistics, None where there are none. The local spec
# has it on the linear layers, Transformer Engine on its attention and norms too; a loader ignores what it does not ask.
_EXTRA_STATES = ("self_attention.linear_qkv", "self_attention.linear_proj", "self_attention.core_attention",
                 "mlp.linear_fc1", "mlp.linear_fc2")  # fmt: skip


@dataclass(frozen=True)
class Chunk:
    """A rectangle of a stored tensor: where it begins and ends in each dimension, and in which file it lies."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


@dataclass(frozen=True)
class StoredTensor:
    """One of the table's tensors in a checkpoint."""

    shape: tuple[int, ...]
    """With padding, without the layers' dimension."""
    dtype: torch.dtype
    layer: int | None
    """Index in the stacked tensor; None: not stacked."""
    chunks: tuple[Chunk, ...]


class DistributedWeights:
    """One model's tensors in a distributed checkpoint."""

    def __init__(self, path: Path, prefix: str = ""):
        """prefix: what stands before the model's keys: `policy.` and `reward_model.` in a run's checkpoints.

        Raises:
            ValueError: not a checkpoint of this format, or its table cannot be read.
        """
        self.path, self.prefix = path, prefix
        if not (path / "metadata.json").is_file() or not (path / ".metadata").is_file():
            raise ValueError(
                f"{path} is not a whole Megatron distributed checkpoint: metadata.json or .metadata is missing"
            )
        backend = json.loads((path / "metadata.json").read_text()).get("sharded_backend")
        if backend != "torch_dist":
            raise ValueError(f"{path}: format {backend!r} is not supported, only torch_dist")
        try:
            self._metadata = FileSystemReader(path).read_metadata()
        except (pickle.UnpicklingError, EOFError, AttributeError, ImportError) as error:
            raise ValueError(f"{path}/.metadata cannot be read: {error}") from error
        self._chunks = self._by_key()
        self._files: dict[str, Tensor] = {}
        self._views: dict[Chunk, Tensor] = {}
        self.tensors: dict[str, StoredTensor] = {}

    def _by_key(self) -> dict[str, list[Chunk]]:
        found: dict[str, list[Chunk]] = {}
        sizes = {
            (key, tuple(chunk.offsets)): tuple(chunk.sizes)
            for key, stored in self._metadata.state_dict_metadata.items()
            if isinstance(stored, TensorStorageMetadata)
            for chunk in stored.chunks
        }
        for index, info in (self._metadata.storage_data or {}).items():
            if index.offset is not None and (index.fqn, tuple(index.offset)) in sizes:
                offsets = tuple(index.offset)
                chunk = Chunk(offsets, sizes[index.fqn, offsets], info.relative_path, info.offset, info.length)
                found.setdefault(index.fqn, []).append(chunk)
        return found

    def check(self, table: Table) -> None:
        """Finds every tensor of the model, and compares shapes.

        Raises:
            ValueError: missing, unexpected or misshapen tensors, or missing or short files; all at once.
        """
        problems, used = [], set()
        for entry in table.entries.values():
            key, stored = self._find(entry.name)
            if stored is None:
                problems.append(f"{self.prefix}{entry.name} is missing")
                continue
            used.add(key)
            self.tensors[entry.name] = stored
            rows_fit = stored.shape[0] >= entry.shape[0] if entry.is_vocabulary else stored.shape[0] == entry.shape[0]
            if not rows_fit or stored.shape[1:] != entry.shape[1:]:
                problems.append(f"{key} has shape {list(stored.shape)}, the model's is {list(entry.shape)}")
        for key in sorted(self._chunks.keys() - used):
            if key.startswith(tuple(self.prefix + part for part in ("embedding.", "decoder.", "output_layer."))):
                problems.append(f"{key} is unexpected")
        lengths = {chunk.file: 0 for stored in self.tensors.values() for chunk in stored.chunks}
        for chunk in (chunk for stored in self.tensors.values() for chunk in stored.chunks):
            lengths[chunk.file] = max(lengths[chunk.file], chunk.start + chunk.length)
        for file, length in sorted(lengths.items()):
            there = (self.path / file).stat().st_size if (self.path / file).is_file() else None
            if there is None or there < length:
                problems.append(
                    f"{file} is missing" if there is None else f"{file} is truncated: {there} of {length} bytes"
                )
        if problems:
            models = sorted({key[: key.index("embedding.")] for key in self._chunks if "embedding." in key})
            hint = f" (prefixes in it: {models})" if self.prefix not in models else ""
            raise ValueError(f"{self.path} does not hold the model: {shorten(problems, '; ')}{hint}")

    def _find(self, name: str) -> tuple[str, StoredTensor | None]:
        for stored_name, is_stacked in stored_names(name):
            key = self.prefix + stored_name
            described = self._metadata.state_dict_metadata.get(key)
            if not isinstance(described, TensorStorageMetadata):
                continue
            layer = int(name.split(".")[2]) if is_stacked else None
            if layer is not None and layer >= described.size[0]:
                return key, None
            return key, StoredTensor(
                tuple(described.size[1:] if is_stacked else described.size),
                described.properties.dtype,
                layer,
                tuple(
                    chunk
                    for chunk in self._chunks.get(key, [])
                    if layer is None or chunk.offsets[0] <= layer < chunk.offsets[0] + chunk.sizes[0]
                ),
            )
        return self.prefix + name, None

    def read_into(self, out: Tensor, name: str, box: Box) -> None:
        """Fills `out` with a rectangle of a tensor of a checked checkpoint.

        Raises:
            ValueError: the checkpoint does not hold all of it, or a file is damaged.
        """
        wanted = (box.rows,) if box.columns is None else (box.rows, box.columns)
        filled = 0
        for sides, source in self._parts(name, box):
            target = out[tuple(slice(a - w, b - w) for (a, b), (w, _) in zip(sides, wanted, strict=True))]
            target.view(torch.uint8).copy_(source)
            filled += target.numel()
        if filled != out.numel():
            raise ValueError(f"{self.path}: {name} has {filled} of {out.numel()} elements of {box} in it")

    def in_one_piece(self, name: str, box: Box) -> Tensor | None:
        """The bytes of a rectangle, as they are mapped, where one file holds them one behind the other; else None."""
        for sides, source in self._parts(name, box):
            whole = sides == ([box.rows] if box.columns is None else [box.rows, box.columns])
            return source if whole and source.is_contiguous() else None
        return None

    def _parts(self, name: str, box: Box) -> Iterator[tuple[list[Interval], Tensor]]:
        """The chunks' parts of a rectangle: rows and columns, and their bytes [rows, bytes of the columns]."""
        stored = self.tensors[name]
        wanted = (box.rows,) if box.columns is None else (box.rows, box.columns)
        width = stored.dtype.itemsize
        for chunk in stored.chunks:
            lead = 0 if stored.layer is None else 1
            extents = list(zip(chunk.offsets[lead:], chunk.sizes[lead:], strict=True))
            common = [overlap((o, o + s), side) for (o, s), side in zip(extents, wanted, strict=True)]
            sides = [side for side in common if side is not None]
            if len(sides) < len(common):
                continue
            data = self._mapped(name, chunk, stored.dtype)
            if stored.layer is not None:
                data = data[stored.layer - chunk.offsets[0]]
            inside = [(start - o, stop - o) for (start, stop), (o, _) in zip(sides, extents, strict=True)]
            inside[-1] = (inside[-1][0] * width, inside[-1][1] * width)
            yield sides, data[tuple(slice(*side) for side in inside)]

    def _mapped(self, name: str, chunk: Chunk, dtype: torch.dtype) -> Tensor:
        """A chunk's bytes in the mapped file, the last dimension as bytes: archives lie at any address."""
        if chunk not in self._views:
            path = self.path / chunk.file
            if chunk.file not in self._files:
                length = path.stat().st_size
                self._files[chunk.file] = torch.from_file(str(path), shared=False, size=length, dtype=torch.uint8)
            archive = self._files[chunk.file][chunk.start : chunk.start + chunk.length]
            try:
                start, size, stride = stored_tensor(archive)
            except (
                ValueError,
                KeyError,
                TypeError,
                EOFError,
                pickle.UnpicklingError,
                zipfile.BadZipFile,
                struct.error,
            ) as error:
                raise ValueError(f"{path}: {self.prefix}{name} cannot be read: {error}") from error
            if size != chunk.sizes or stride != torch.empty(size, device="meta").stride():
                raise ValueError(f"{path}: {name} is {size} by strides {stride}; .metadata says {chunk.sizes}, dense")
            data = archive[start : start + num_bytes_of(size, dtype)]
            self._views[chunk] = data.view(*size[:-1], size[-1] * dtype.itemsize)
        return self._views[chunk]

    def stamp(self) -> dict[str, list[int]]:
        """Sizes and times of the files: what tells that they are the same as before."""
        files = sorted({chunk.file for stored in self.tensors.values() for chunk in stored.chunks} | {".metadata"})
        stats = {file: (self.path / file).stat() for file in files}
        return {file: [stat.st_size, stat.st_mtime_ns] for file, stat in stats.items()}


class _TensorPickle(pickle.Unpickler):
    """Reads where a saved tensor lies in its storage, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *rest: (storage, offset, tuple(size), tuple(stride))
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name.endswith("Storage"):
            return name
        raise pickle.UnpicklingError(f"{module}.{name} where a tensor was expected")

    def persistent_load(self, pid: Any) -> str:
        return str(pid[2])


class _Bytes(io.RawIOBase):
    """Mapped bytes as a file, without a copy."""

    def __init__(self, data: Tensor):
        self._data = data.numpy().data
        self._position = 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: len(self._data)}[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        part = self._data[self._position : self._position + len(buffer)]
        buffer[: len(part)] = part
        self._position += len(part)
        return len(part)


def stored_tensor(archive: Tensor) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """Where the elements of a tensor begin in what torch.save made of it, its shape and its strides.

    archive: uint8. It is a zip file without compression: elements can be mapped instead of loaded.

    Raises:
        ValueError, KeyError, BadZipFile, UnpicklingError: not such an archive.
    """
    file = _Bytes(archive)
    records = {info.filename.partition("/")[2]: info for info in zipfile.ZipFile(file).infolist()}

    def position(record: zipfile.ZipInfo) -> int:
        file.seek(record.header_offset + 26)
        name_length, extra_length = struct.unpack("<HH", file.read(4))
        return int(record.header_offset + 30 + name_length + extra_length)

    file.seek(position(records["data.pkl"]))
    described = io.BytesIO(file.read(records["data.pkl"].file_size))
    storage, offset, size, stride = _TensorPickle(described).load()
    record = records[f"data/{storage}"]
    if offset or record.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"the tensor begins at element {offset} of its storage, or is compressed")
    return position(record), size, stride


@dataclass(frozen=True)
class WrittenTensor:
    """A chunk of a `*.distcp` file; a list of them is the file's note, from which `.metadata` is put together."""

    key: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    start: int
    length: int


def write_chunk(stream: BinaryIO, key: str, offsets: tuple[int, ...], tensor: Tensor) -> WrittenTensor:
    """Appends a tensor to a `*.distcp` file; offsets: of its first element in the whole stored tensor.

    Raises:
        OSError: the disk refused.
    """
    start = stream.tell()
    checksums = torch.serialization.get_crc32_options()
    try:
        # No loader reads the archive's checksums, and they cost more than writing.
        torch.serialization.set_crc32_options(False)
        torch.save(tensor, stream)
    except RuntimeError as error:
        # torch closes its archive after a write that failed, and that fails again, less tellingly.
        raise error.__context__ if isinstance(error.__context__, OSError) else error from error
    finally:
        torch.serialization.set_crc32_options(checksums)
    return WrittenTensor(key, offsets, tuple(tensor.shape), start, stream.tell() - start)


def write_tables(
    directory: Path,
    stored: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    files: Mapping[str, Iterable[WrittenTensor]],
    num_layers: int,
) -> None:
    """Writes what stands beside the `*.distcp` files; metadata.json last, which makes the checkpoint whole.

    stored: key -> (shape, dtype) of every stored tensor. files: what each file holds.
    """
    results = []
    chunks: dict[str, list[ChunkStorageMetadata]] = {key: [] for key in stored}
    for file, written in files.items():
        for item in written:
            offsets = torch.Size(item.offsets)
            chunks[item.key].append(ChunkStorageMetadata(offsets=offsets, sizes=torch.Size(item.sizes)))
            info = _StorageInfo(file, item.start, item.length)
            results.append(WriteResult(MetadataIndex(item.key, offsets), item.length, info))
    described: dict[str, Any] = {
        key: TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(shape), chunks[key])
        for key, (shape, dtype) in stored.items()
    }
    extra_states = "extra_states.distcp"
    with open(directory / extra_states, "wb") as stream:
        nothing = io.BytesIO()
        torch.save([None], nothing)
        for key in _extra_state_keys(num_layers):
            described[key] = BytesStorageMetadata()
            info = _StorageInfo(extra_states, stream.tell(), len(nothing.getbuffer()))
            stream.write(nothing.getbuffer())
            results.append(WriteResult(MetadataIndex(key), info.length, info))
    FileSystemWriter(directory).finish(Metadata(state_dict_metadata=described), [results])
    torch.save({}, directory / "common.pt")
    write_atomically(directory / "metadata.json", json.dumps(_BACKENDS))


def _extra_state_keys(num_layers: int) -> list[str]:
    layers = [
        f"decoder.layers.{part}._extra_state/shard_{layer}_{num_layers}"
        for part in _EXTRA_STATES
        for layer in range(num_layers)
    ]
    return [*layers, "decoder.final_layernorm._extra_state/shard_0_1"]
