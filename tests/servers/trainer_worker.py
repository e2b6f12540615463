"""Trainers in several layouts publish to servers that run already, by every transport, and generate greedily.

    python -m tests.servers.trainer_worker SPEC.json OUTPUT.json

SPEC: urls, tensor, sources (Hugging Face directories of one geometry, published in turns), directory, layouts (name ->
degrees and `world`), transports. OUTPUT: one record a publication. Ranks are forked from this process, which has
imported everything.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from oreal_megatron.config import ParallelConfig, SamplingConfig
from oreal_megatron.conversion.module import load_weights
from oreal_megatron.distributed.cpu_backend import cpu_backend
from oreal_megatron.distributed.groups import parallel_groups
from oreal_megatron.models.virtual_stages import chunks_of
from oreal_megatron.types import GenerationRequest
from tests.ranks import run_ranks
from tests.tiny_servers import open_servers

PROMPTS = ((5, 6, 8, 9), (100, 101, 102), (17,), tuple(range(20, 60)))
NUM_TOKENS = 24


def main(spec: dict[str, Any], output: Path) -> None:
    torch.set_num_threads(1)
    records: list[dict[str, Any]] = []
    for name, layout in spec["layouts"].items():
        world = layout.pop("world")
        part = output.with_suffix(f".{name}")
        run_ranks(world, publish, layout, name, spec, len(records), part)
        records += json.loads(part.read_text())
    output.write_text(json.dumps(records))


def publish(rank: int, layout: dict[str, int], name: str, spec: dict[str, Any], first: int, output: Path) -> None:
    config = ParallelConfig(micro_batch_tokens=64, timeout_seconds=600, **layout)
    requests = [GenerationRequest(prompt_ids=ids, seed=0, max_new_tokens=NUM_TOKENS) for ids in PROMPTS]
    greedy = SamplingConfig(temperature=0.0, top_p=1.0, max_new_tokens=NUM_TOKENS)
    sources = [Path(source) for source in spec["sources"]]
    directory = Path(spec["directory"]) / name
    records = []
    with cpu_backend(), parallel_groups(config, seed=0) as groups:
        for number, transport in enumerate(spec["transports"], start=first):
            servers = open_servers(
                groups, sources[0], directory / transport, urls=spec["urls"], tensor=spec["tensor"], transport=transport
            )
            for version in range(2):  # the second one goes through the groups that the first has made
                source = sources[(number + version) % len(sources)]
                for chunk in chunks_of(servers.policy):
                    load_weights(chunk, source, groups)
                report = servers.engine.publish(version)
                completions = servers.generate(requests, greedy)
            servers.engine.close()
            records.append(
                {
                    "layout": name,
                    "transport": transport,
                    "source": str(source),
                    "report": dict(report),
                    "completions": [[list(c.token_ids), list(c.logprobs)] for c in completions],
                }
            )
        if groups.is_main:
            output.write_text(json.dumps(records))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
