"""The disk transport: every rank writes its own part of a Hugging Face directory, without gathering tensors.

A pipeline stage has one safetensors file, which its tensor ranks map and fill together; they are on one node, where
tensor parallelism is fast. The directories are caches for servers: runs do not resume from them.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oreal_megatron.conversion.module import shard_parameters
from oreal_megatron.conversion.rules import Box
from oreal_megatron.conversion.weights import INDEX, NewShard
from oreal_megatron.files import write_atomically
from oreal_megatron.weight_sync.source import PolicyShards
from oreal_megatron.weight_sync.types import PausedServer, TransferFailure, TransferResult, failure_of_answer

_NAME = "version_{:06d}"


class DiskTransport:
    """See Transport. Keeps a directory for each of the last two versions, on a file system that servers share."""

    def __init__(self, shards: PolicyShards, directory: Path, *, config_json: Mapping[str, Any]):
        """config_json: content of the model's config.json."""
        self._shards = shards
        self._groups = shards.groups
        self._directory = directory
        self._config_json = dict(config_json)
        by_stage: dict[int, dict[str, tuple[tuple[int, ...], torch.dtype]]] = {}
        for name, origin in shards.table.origins.items():
            entry = shards.table.entries[origin.runs[0].tensor]
            stage, _ = shards.layout.stage_of(entry, shards.geometry.num_layers)
            by_stage.setdefault(stage, {})[name] = (origin.shape, shards.dtype)
        self._files = {
            stage: NewShard(f"model-{stage + 1:05d}-of-{len(by_stage):05d}.safetensors", tensors)
            for stage, tensors in by_stage.items()
        }
        self.current: Path | None = None
        """Directory of the version that was prepared last."""
        self._write_seconds = 0.0

    def prepare(self, weight_version: int) -> None:
        """Writes the directory of a version; see Transport."""
        start = time.perf_counter()
        target = (self._directory / _NAME.format(weight_version)).absolute()
        if self._groups.is_main:
            for old in self._directory.glob("version_*"):
                if old.absolute() != self.current or old.absolute() == target:
                    shutil.rmtree(old)
            target.mkdir(parents=True)
        self._groups.barrier()
        shard = self._files[self._groups.pipeline_rank]
        is_writer = self._groups.data_rank == 0 and self._groups.context_rank == 0  # all replicas hold the same
        if is_writer and self._groups.tensor_rank == 0:
            with open(target / shard.file, "wb") as stream:
                stream.write(shard.header())
                stream.truncate(len(shard.header()) + shard.num_bytes)
        self._groups.barrier()
        if is_writer:
            self._fill(target / shard.file, shard)
        self._groups.barrier()
        if self._groups.is_main:
            weight_map = {name: shard.file for shard in self._files.values() for name in shard.tensors}
            total = sum(shard.num_bytes for shard in self._files.values())
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_atomically(target / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")
            write_atomically(target / "config.json", json.dumps(self._config_json, indent=2) + "\n")
        self.current = target
        self._write_seconds = time.perf_counter() - start

    def send(self, servers: Sequence[PausedServer]) -> TransferResult:
        """Has every server load the directory; see Transport. `transfer` is the time that writing it took."""
        start = time.perf_counter()
        failures: dict[str, TransferFailure] = {}
        if self._groups.is_main:
            assert self.current is not None, "prepare must be called before send"
            loading = {server.name: server.update_weights_from_disk(self.current) for server in servers}
            for name, answer in loading.items():
                if (failure := failure_of_answer(answer)) is not None:
                    failures[name] = failure
        failures = self._groups.from_main(failures)
        return TransferResult(
            failures=failures,
            num_bytes=self._shards.num_bytes,
            seconds={"transfer": self._write_seconds, "load": time.perf_counter() - start},
        )

    def close(self) -> None:
        """Does nothing: the directories stay."""

    @torch.no_grad()
    def _fill(self, path: Path, shard: NewShard) -> None:
        views = _mapped(path, shard)
        for part, tensor, box in self._parts():
            view = views[tensor][slice(*box.rows)]
            (view if box.columns is None else view[:, slice(*box.columns)]).copy_(part)
        del views
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # so that other machines read it
        finally:
            os.close(descriptor)

    def _parts(self) -> Iterator[tuple[Tensor, str, Box]]:
        """Yields what this rank writes: (elements, Hugging Face tensor, their rectangle of it)."""
        for chunk in self._shards.chunks:
            for shard in shard_parameters(chunk, self._shards.table, self._groups):
                if shard.name in self._shards.table.module_aliases:
                    continue  # the last stage's copy of a tied embedding
                if self._groups.tensor_rank > 0 and shard.boxes == (shard.entry.whole(shard.num_rows),):
                    continue  # the same on every tensor rank
                for part, box in shard.parts():
                    for copy in shard.entry.sources(box):
                        yield part[slice(*copy.at)], copy.source, copy.box


def _mapped(path: Path, shard: NewShard) -> dict[str, Tensor]:
    """Maps a file and returns its tensors by name; writing to them writes to the file."""
    start = len(shard.header())
    whole = torch.from_file(str(path), shared=True, size=start + shard.num_bytes, dtype=torch.uint8)
    views = {}
    for name, (shape, dtype) in shard.tensors.items():
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        views[name] = whole[start : start + num_bytes].view(dtype).view(shape)
        start += num_bytes
    return views
