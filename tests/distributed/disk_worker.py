"""One of several ranks: loads a model, publishes it to disk. torchrun ... disk_worker.py SOURCE OUTPUT LAYOUTS"""

from __future__ import annotations

import json
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
from oreal_megatron.parallel.groups import joined_processes, split_processes
from oreal_megatron.resharding.disk import DiskTransport


def main(source: Path, output: Path, layouts: dict[str, dict[str, int]]) -> None:
    torch.set_num_threads(1)
    geometry = geometry_of(source)
    model = ModelConfig(
        path=str(source), geometry=None, tokenizer="unused", implementation="local", dtype="float32",
        max_sequence_length=128,
    )  # fmt: skip
    with device_seam(), joined_processes(timeout_seconds=120):
        for name, layout in layouts.items():
            with split_processes(ParallelConfig(micro_batch_tokens=64, **layout), seed=0) as groups:
                policy = build_gpt(
                    Policy, geometry, model, groups,
                    vocab_size=geometry.vocab_size, seed=0, tied_embeddings=geometry.tied_embeddings,
                )  # fmt: skip
                chunks = chunks_of(policy)
                for chunk in chunks:
                    load_weights(chunk, source, groups)
                config = json.loads((source / "config.json").read_text())
                transport = DiskTransport(chunks, geometry, groups, output / name, config_json=config)
                transport.prepare(3)
                transport.prepare(4)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
