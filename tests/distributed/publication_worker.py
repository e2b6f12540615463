"""Four trainer ranks publish to two servers of TP2, whose workers run the real loader without SGLang round it.

    python -m tests.distributed.publication_worker SOURCE LAYOUT    layout: degrees, as JSON

Workers are processes that hold parameters as SGLang's do; a pipe stands for HTTP. Everything is forked from this
process, which has imported everything. Exits with an error where a tensor differs.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import socket
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from oreal_megatron.config import GeometryConfig, ModelConfig, ParallelConfig
from oreal_megatron.convert.families import family_of
from oreal_megatron.convert.huggingface import geometry_of
from oreal_megatron.convert.module import load_weights
from oreal_megatron.models.architecture import build_gpt
from oreal_megatron.models.chunks import chunks_of
from oreal_megatron.models.policy import Policy
from oreal_megatron.parallel.device import device_seam
from oreal_megatron.parallel.groups import ParallelGroups, parallel_groups
from oreal_megatron.resharding import loader
from oreal_megatron.resharding.audit import Auditor
from oreal_megatron.resharding.direct import DirectTransport
from oreal_megatron.resharding.ipc import IpcTransport
from oreal_megatron.resharding.orders import Desk
from oreal_megatron.resharding.publish import Publisher
from oreal_megatron.resharding.served import LOADER, EngineLayout, served_tensors
from oreal_megatron.resharding.shards import PolicyShards
from tests.unit.resharding.test_plan import served

FORK = multiprocessing.get_context("fork")
WORLD, NUM_SERVERS = 4, 2
LAYOUT = EngineLayout(count=NUM_SERVERS, tensor=2, feed_forward_multiple=32)
BUCKET_BYTES = 4096


class Model:
    """What the loader needs of SGLang's model."""

    def __init__(self, geometry: GeometryConfig, rank: int):
        table = family_of(geometry).table(geometry, "causal")
        self.tensors = {t.name: torch.randn(t.shape) for t in served_tensors(table, geometry, LAYOUT, rank)}

    def named_parameters(self) -> Any:
        return self.tensors.items()


def work(pipe: Connection, geometry: GeometryConfig, rank: int) -> None:
    """A tensor-parallel worker: loads what it is sent, and shows what it holds when it is sent nothing."""
    model = Model(geometry, rank)
    while True:
        payload = pipe.recv_bytes()
        if payload:
            loader.load(model, pickle.loads(payload))  # type: ignore[arg-type]
        pipe.send(None if payload else {name: tensor.numpy() for name, tensor in model.tensors.items()})


@dataclass
class Server:
    """See resharding.delivery.PausedServer, of which a transport through the loader needs this much."""

    index: int
    name: str
    pipes: list[Connection]
    processes: list[Any]
    pool: ThreadPoolExecutor

    def ask(self, payloads: list[bytes]) -> list[Any]:
        try:
            for pipe, payload in zip(self.pipes, payloads, strict=True):
                pipe.send_bytes(payload)
            return [pipe.recv() for pipe in self.pipes]
        except (EOFError, OSError) as error:
            raise ConnectionError(f"{self.name}: {type(error).__name__}") from error

    def load_tensors(self, payloads: list[bytes], load_format: str) -> Future[Any]:
        assert load_format == LOADER
        return self.pool.submit(self.ask, payloads)


def main(source: Path, layout: dict[str, int]) -> None:
    torch.set_num_threads(1)
    geometry = geometry_of(source)
    servers = []
    for number in range(NUM_SERVERS):
        pipes, processes = [], []
        for rank in range(LAYOUT.tensor):
            ours, theirs = FORK.Pipe()
            processes.append(FORK.Process(target=work, args=(theirs, geometry, rank), daemon=True))
            processes[-1].start()
            theirs.close()
            pipes.append(ours)
        servers.append((number, f"server {number}", pipes, processes))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [FORK.Process(target=publish, args=(r, port, source, layout, servers)) for r in range(WORLD)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    sys.exit(any(rank.exitcode for rank in ranks))


def publish(rank: int, port: int, source: Path, layout: dict[str, int], opened: list[Any]) -> None:
    where = {"RANK": rank, "WORLD_SIZE": WORLD, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in where.items()}
    geometry = geometry_of(source)
    config = ParallelConfig(micro_batch_tokens=64, timeout_seconds=120, **layout)
    with device_seam(), parallel_groups(config, seed=0) as groups:
        model = ModelConfig(
            path=str(source), geometry=None, tokenizer="unused", implementation="local", dtype="float32",
            max_sequence_length=128,
        )  # fmt: skip
        policy = build_gpt(
            Policy, geometry, model, groups,
            vocab_size=geometry.vocab_size, seed=0, tied_embeddings=geometry.tied_embeddings,
        )  # fmt: skip
        chunks = chunks_of(policy)
        for chunk in chunks:
            load_weights(chunk, source, groups)
        shards = PolicyShards(chunks, geometry, groups)
        servers = [Server(*one, ThreadPoolExecutor(1)) for one in opened] if groups.is_main else []
        carry_out(groups, shards, servers, source)


def carry_out(groups: ParallelGroups, shards: PolicyShards, servers: list[Any], source: Path) -> None:
    desk = Desk(shards, LAYOUT, timeout_seconds=60)
    auditor = Auditor(shards, LAYOUT, desk)
    direct = Publisher(DirectTransport(shards, LAYOUT, desk, bucket_bytes=BUCKET_BYTES), auditor)
    ipc = Publisher(IpcTransport(shards, LAYOUT, desk, bucket_bytes=BUCKET_BYTES), auditor)
    for number, publisher in enumerate((direct, ipc, direct), start=1):
        double(shards)
        delivery = publisher.deliver(servers)
        assert not delivery.failures, delivery.failures
        compare(servers, source, shards.geometry, factor=2**number)
    double(shards)
    if groups.is_main:
        servers[1].processes[0].kill()
    # All were one group: the living server has not the weights either, and takes them when it is sent to alone.
    failures = direct.deliver(servers).failures
    assert failures["server 1"].is_lost and not failures["server 0"].is_lost, failures
    assert not direct.deliver(servers[:1]).failures
    compare(servers[:1], source, shards.geometry, factor=2**4)
    direct.close()


@torch.no_grad()
def double(shards: PolicyShards) -> None:
    """An update, exact in every dtype."""
    for tensor in shards.tensors().values():
        tensor.mul_(2)


def compare(servers: list[Any], source: Path, geometry: GeometryConfig, *, factor: int) -> None:
    """Every worker holds its part of the source's weights times `factor`, and zeros in the padding."""
    weights = {name: factor * tensor.numpy() for name, tensor in load_file(source / "model.safetensors").items()}
    for server in servers:
        for rank, held in enumerate(server.ask([b""] * LAYOUT.tensor)):
            for name, expected in served(weights, geometry, LAYOUT, rank).items():
                np.testing.assert_array_equal(held[name], expected, err_msg=f"{server.name} rank {rank}: {name}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
