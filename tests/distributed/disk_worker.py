"""Four ranks load a model and publish it to disk, in one layout after the other, on fresh processes each.

    python -m tests.distributed.disk_worker SOURCE OUTPUT LAYOUTS    layouts: name -> degrees, as JSON

Processes are forked from this one, which has imported everything.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
from pathlib import Path

import torch

from oreal_megatron.config import ModelConfig, ParallelConfig
from oreal_megatron.convert.huggingface import geometry_of
from oreal_megatron.convert.module import load_weights
from oreal_megatron.models.architecture import build_gpt
from oreal_megatron.models.chunks import chunks_of
from oreal_megatron.models.policy import Policy
from oreal_megatron.parallel.device import device_seam
from oreal_megatron.parallel.groups import parallel_groups
from oreal_megatron.resharding.disk import DiskTransport
from oreal_megatron.resharding.shards import PolicyShards

FORK = multiprocessing.get_context("fork")
WORLD = 4


def main(source: Path, output: Path, layouts: dict[str, dict[str, int]]) -> None:
    torch.set_num_threads(1)
    for name, layout in layouts.items():
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ranks = [
            FORK.Process(target=publish, args=(rank, port, source, output / name, layout)) for rank in range(WORLD)
        ]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
        if any(rank.exitcode for rank in ranks):
            sys.exit(f"{name}: a rank failed")


def publish(rank: int, port: int, source: Path, output: Path, layout: dict[str, int]) -> None:
    where = {"RANK": rank, "WORLD_SIZE": WORLD, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in where.items()}
    geometry = geometry_of(source)
    model = ModelConfig(
        path=str(source), geometry=None, tokenizer="unused", implementation="local", dtype="float32",
        max_sequence_length=128,
    )  # fmt: skip
    config = ParallelConfig(micro_batch_tokens=64, timeout_seconds=120, **layout)
    with device_seam(), parallel_groups(config, seed=0) as groups:
        policy = build_gpt(
            Policy, geometry, model, groups,
            vocab_size=geometry.vocab_size, seed=0, tied_embeddings=geometry.tied_embeddings,
        )  # fmt: skip
        chunks = chunks_of(policy)
        for chunk in chunks:
            load_weights(chunk, source, groups)
        described = json.loads((source / "config.json").read_text())
        transport = DiskTransport(PolicyShards(chunks, geometry, groups), output, config_json=described)
        transport.prepare(3)
        transport.prepare(4)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
