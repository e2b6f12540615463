"""Megatron's distributed checkpoint format (torch_dist), read and written without Megatron and in a single process.

A checkpoint is a directory of `*.distcp` files, each a sequence of torch.save archives; `.metadata`, the table in which
torch.distributed.checkpoint keeps the place of each rectangle of each tensor; and Megatron-Core's `common.pt` and
`metadata.json`. Layers of a kind are stacked: `decoder.layers.mlp.linear_fc2.weight` is [layers, rows, columns].
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
# Modules whose extra state Megatron-Core's loaders read: FP8 statistics, or None. The local spec has it on the linear
# layers, Transformer Engine also on attention and norms; a loader ignores states of modules that it does not have.
_EXTRA_STATES = ("self_attention.linear_qkv", "self_attention.linear_proj", "self_attention.core_attention",
                 "mlp.linear_fc1", "mlp.linear_fc2")  # fmt: skip


@dataclass(frozen=True)
class Chunk:
    """A rectangle of a stored tensor, and its place in a `*.distcp` file."""

    key: str
    """Name of the stored tensor."""
    offsets: tuple[int, ...]
    """First index of the rectangle in each dimension."""
    sizes: tuple[int, ...]
    file: str
    start: int
    """Byte at which the chunk's archive begins."""
    length: int
    """Bytes of the archive."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the conversion table in a checkpoint."""

    shape: tuple[int, ...]
    """Shape with padding, without the dimension of the layers."""
    dtype: torch.dtype
    layer: int | None
    """Index in the stacked tensor; None if layers are not stacked."""
    chunks: tuple[Chunk, ...]


class DistributedWeights:
    """The tensors of a model in a distributed checkpoint."""

    def __init__(self, path: Path, prefix: str = ""):
        """prefix: prefix of the model's keys: `policy.` or `reward_model.` in a run's checkpoints.

        Raises:
            ValueError: the directory is not a checkpoint of this format, or its table cannot be read.
        """
        self.path, self.prefix = path, prefix
        if not (path / "metadata.json").is_file() or not (path / ".metadata").is_file():
            raise ValueError(
                f"{path} is not a complete Megatron distributed checkpoint: metadata.json or .metadata is missing"
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
                chunk = Chunk(
                    index.fqn, offsets, sizes[index.fqn, offsets], info.relative_path, info.offset, info.length
                )
                found.setdefault(index.fqn, []).append(chunk)
        return found

    def check(self, table: Table) -> None:
        """Finds every tensor of the model and compares shapes.

        Raises:
            ValueError: tensors are missing, unexpected or of another shape, or files are missing or truncated; lists
                all problems.
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
            ValueError: the checkpoint does not hold all of the rectangle, or a file is damaged.
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
        """Returns the mapped bytes of a rectangle if a single file holds them contiguously, otherwise None."""
        for sides, source in self._parts(name, box):
            whole = sides == ([box.rows] if box.columns is None else [box.rows, box.columns])
            return source if whole and source.is_contiguous() else None
        return None

    def _parts(self, name: str, box: Box) -> Iterator[tuple[list[Interval], Tensor]]:
        """Yields the chunks' parts of a rectangle: (rows and columns, bytes [rows, bytes of the columns])."""
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
        """Returns a chunk's mapped bytes; the last dimension is in bytes, because archives are not aligned."""
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
        """Returns sizes and times of the files, by which a later run recognises the same input."""
        files = sorted({chunk.file for stored in self.tensors.values() for chunk in stored.chunks} | {".metadata"})
        stats = {file: (self.path / file).stat() for file in files}
        return {file: [stat.st_size, stat.st_mtime_ns] for file, stat in stats.items()}


class _TensorPickle(pickle.Unpickler):
    """Reads the place of a saved tensor in its storage, without loading it."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *rest: (storage, offset, tuple(size), tuple(stride))
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name.endswith("Storage"):
            return name
        raise pickle.UnpicklingError(f"found {module}.{name}, expected a tensor")

    def persistent_load(self, pid: Any) -> str:
        return str(pid[2])


class _Bytes(io.RawIOBase):
    """A file over mapped bytes, without a copy."""

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
    """Returns (byte at which the elements begin, shape, strides) of the tensor in a torch.save archive.

    archive: uint8 [n], a zip file without compression, so that elements can be mapped instead of loaded.

    Raises:
        ValueError, KeyError, BadZipFile, UnpicklingError: the bytes are not such an archive.
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


def write_chunk(stream: BinaryIO, file: str, key: str, offsets: tuple[int, ...], tensor: Tensor) -> Chunk:
    """Appends a tensor to a `*.distcp` file.

    file: the file's final name. offsets: index of the tensor's first element in the whole stored tensor.

    Raises:
        OSError: the file could not be written.
    """
    start = stream.tell()
    checksums = torch.serialization.get_crc32_options()
    try:
        # No loader reads the archive's checksums, and computing them takes longer than writing.
        torch.serialization.set_crc32_options(False)
        torch.save(tensor, stream)
    except RuntimeError as error:
        # After a failed write torch closes its archive, which fails too, with a less useful error.
        raise error.__context__ if isinstance(error.__context__, OSError) else error from error
    finally:
        torch.serialization.set_crc32_options(checksums)
    return Chunk(key, offsets, tuple(tensor.shape), file, start, stream.tell() - start)


def write_tables(
    directory: Path,
    stored: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    chunks: Iterable[Chunk],
    num_layers: int,
) -> None:
    """Writes the files that describe the `*.distcp` files; metadata.json is last and makes the checkpoint complete.

    stored: key -> (shape, dtype) of every stored tensor. chunks: all chunks of all files.
    """
    results = []
    by_key: dict[str, list[ChunkStorageMetadata]] = {key: [] for key in stored}
    for chunk in chunks:
        offsets = torch.Size(chunk.offsets)
        by_key[chunk.key].append(ChunkStorageMetadata(offsets=offsets, sizes=torch.Size(chunk.sizes)))
        info = _StorageInfo(chunk.file, chunk.start, chunk.length)
        results.append(WriteResult(MetadataIndex(chunk.key, offsets), chunk.length, info))
    described: dict[str, Any] = {
        key: TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(shape), by_key[key])
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
