"""Four ranks load a model and publish it to disk, in one layout after the other, on fresh processes each.

    python -m tests.distributed.disk_worker SOURCE OUTPUT LAYOUTS    layouts: name -> degrees, as JSON

Processes are forked from this one, which has imported everything.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from oreal_megatron.config import ParallelConfig
from oreal_megatron.conversion.huggingface import geometry_of
from oreal_megatron.distributed.cpu_backend import cpu_backend
from oreal_megatron.distributed.groups import parallel_groups
from oreal_megatron.weight_sync.disk import DiskTransport
from oreal_megatron.weight_sync.source import PolicyShards
from tests.ranks import run_ranks
from tests.tiny_models import policy_chunks


def main(source: Path, output: Path, layouts: dict[str, dict[str, int]]) -> None:
    torch.set_num_threads(1)
    for name, layout in layouts.items():
        run_ranks(4, publish, source, output / name, layout)


def publish(rank: int, source: Path, output: Path, layout: dict[str, int]) -> None:
    geometry = geometry_of(source)
    config = ParallelConfig(micro_batch_tokens=64, timeout_seconds=120, **layout)
    with cpu_backend(), parallel_groups(config, seed=0) as groups:
        chunks = policy_chunks(source, groups)
        described = json.loads((source / "config.json").read_text())
        transport = DiskTransport(PolicyShards(chunks, geometry, groups), output, config_json=described)
        transport.prepare(3)
        transport.prepare(4)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
