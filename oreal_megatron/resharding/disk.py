"""Weights by way of a file system: every rank writes its own part of a Hugging Face directory, nothing is gathered.

A pipeline stage has one safetensors file, which its tensor ranks map and fill side by side; they are on one node, as
tensor parallelism wants it. Directories are caches for servers: nothing resumes from them.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from oreal_megatron.config import GeometryConfig
from oreal_megatron.convert.families import family_of
from oreal_megatron.convert.layout import Layout
from oreal_megatron.convert.module import held_parameters
from oreal_megatron.convert.rules import Box
from oreal_megatron.convert.weights import INDEX, NewShard
from oreal_megatron.files import write_atomically
from oreal_megatron.parallel.groups import ParallelGroups

_NAME = "version_{:06d}"


class LoadsDirectories(Protocol):
    """A server that takes weights from a Hugging Face directory: rollout.client.ServerClient."""

    async def load_directory(self, directory: Path) -> None: ...


class DiskTransport:
    """A rollout.sglang.WeightTransport: a directory a version, the last two kept."""

    start_is_current = True

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        geometry: GeometryConfig,
        groups: ParallelGroups,
        directory: Path,
        *,
        config_json: Mapping[str, Any],
    ):
        """chunks: this rank's GPTModels. geometry: with vocab_size, without padding. config_json: of the model."""
        self._chunks = chunks
        self._groups = groups
        self._directory = directory
        self._config_json = dict(config_json)
        self._table = family_of(geometry).table(geometry, "causal")
        self._dtype = next(chunks[0].parameters()).dtype
        layout = Layout(groups.tensor_size, groups.pipeline_size, groups.layout.virtual_pipeline)
        by_stage: dict[int, dict[str, tuple[tuple[int, ...], torch.dtype]]] = {}
        for name, origin in self._table.origins.items():
            entry = self._table.entries[origin.pieces[0].entry]
            stage, _ = layout.stage_of(entry, geometry.num_layers)
            by_stage.setdefault(stage, {})[name] = (origin.shape, self._dtype)
        self._files = {
            stage: NewShard(f"model-{stage + 1:05d}-of-{len(by_stage):05d}.safetensors", tensors)
            for stage, tensors in by_stage.items()
        }
        self._current: Path | None = None

    @property
    def start_from(self) -> Path:
        assert self._current is not None, "prepare comes first"
        return self._current

    def prepare(self, weight_version: int) -> None:
        """Writes the directory; every rank calls it.

        Raises:
            OSError: the disk refused.
        """
        target = (self._directory / _NAME.format(weight_version)).absolute()
        if self._groups.is_main:
            for old in self._directory.glob("version_*"):
                if old.absolute() != self._current or old.absolute() == target:
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
        self._current = target

    async def load(self, server: LoadsDirectories) -> None:
        await server.load_directory(self.start_from)

    @torch.no_grad()
    def _fill(self, path: Path, shard: NewShard) -> None:
        views = _mapped(path, shard)
        for part, tensor, box in self._parts():
            view = views[tensor][slice(*box.rows)]
            (view if box.columns is None else view[:, slice(*box.columns)]).copy_(part)
        del views
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # other machines see it
        finally:
            os.close(descriptor)

    def _parts(self) -> Iterator[tuple[Tensor, str, Box]]:
        """What this rank has to write: its rows, and the rectangle of the Hugging Face tensor that they are."""
        for chunk in self._chunks:
            for held in held_parameters(chunk, self._table, self._groups):
                if held.name in self._table.module_aliases:
                    continue  # the last stage's copy of a tied embedding
                if self._groups.tensor_rank > 0 and held.boxes == (held.entry.whole(held.num_rows),):
                    continue  # the same on every tensor rank
                for part, box in held.parts():
                    for copy in held.entry.sources(box):
                        yield part[slice(*copy.at)], copy.source, copy.box


def _mapped(path: Path, shard: NewShard) -> dict[str, Tensor]:
    """The file's tensors, mapped: what is written to them is in the file."""
    start = len(shard.header())
    whole = torch.from_file(str(path), shared=True, size=start + shard.num_bytes, dtype=torch.uint8)
    views = {}
    for name, (shape, dtype) in shard.tensors.items():
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        views[name] = whole[start : start + num_bytes].view(dtype).view(shape)
        start += num_bytes
    return views
