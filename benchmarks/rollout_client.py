"""Our rollout client against a bare load generator: the same requests, concurrency and server, in turns.

    python -m benchmarks.rollout_client

The bare one has the requests' bytes ready, keeps a connection a request in flight, and looks at no answer. Decoding is
greedy, so both have the server do the same. Prints the median ratio of their seconds over pairs; it may be up to 1.05.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

from benchmarks.pairs import compare
from oreal_megatron.compose import composed, validated
from oreal_megatron.config import GeometryConfig, ModelConfig, ParallelConfig, SamplingConfig
from oreal_megatron.distributed.cpu_backend import cpu_backend
from oreal_megatron.distributed.environment import devices_hidden
from oreal_megatron.distributed.groups import parallel_groups
from oreal_megatron.models.policy import build_policy
from oreal_megatron.rollout.build_sglang import build_sglang_engine
from oreal_megatron.stopping import StopRequest
from oreal_megatron.timeline import Timeline
from oreal_megatron.types import GenerationRequest

CONCURRENCY = 32
STOP = 7
GEOMETRY = GeometryConfig(
    num_layers=2,
    hidden_size=48,
    ffn_hidden_size=96,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=12,
    vocab_size=120,
    qkv_bias=True,
    init_std=0.2,
)
MODEL = ModelConfig(
    path=None,
    geometry=GEOMETRY,
    tokenizer="unused",
    implementation="local",
    dtype="float32",
    max_sequence_length=256,
)


async def bare_load(url: str, bodies: list[bytes]) -> None:
    """Posts every body to /generate, CONCURRENCY at a time."""
    host, port = urlsplit(url).hostname, urlsplit(url).port
    waiting = list(reversed(bodies))

    async def place() -> None:
        reader, writer = await asyncio.open_connection(host, port, limit=2**24)
        while waiting:
            body = waiting.pop()
            head = f"POST /generate HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
            writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            answer = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            assert answer.startswith("http/1.1 200"), answer
            await reader.readexactly(int(answer.split("content-length: ")[1].split("\r\n")[0]))
        writer.close()

    await asyncio.gather(*(place() for _ in range(CONCURRENCY)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=128, help="of every response, at most")
    arguments = parser.parse_args()
    layout = ParallelConfig(tensor=1, pipeline=1, micro_batch_tokens=512)
    with (
        tempfile.TemporaryDirectory() as name,
        devices_hidden(),
        cpu_backend(),
        parallel_groups(layout, seed=0) as groups,
    ):
        directory = Path(name)
        options = (f"rollout.sglang.max_concurrency={CONCURRENCY}", "rollout.sglang.startup_seconds=900")
        servers = validated(composed(["experiment=arithmetic", "rollout=sglang_cpu", *options])).rollout.sglang
        assert servers is not None
        engine = build_sglang_engine(
            servers,
            build_policy(GEOMETRY, MODEL, groups, vocab_size=120, seed=0),
            GEOMETRY,
            groups,
            directory=directory,
            stop=StopRequest(),
            timeline=Timeline(),
            dtype="float32",
            stop_token_id=STOP,
            max_sequence_length=MODEL.max_sequence_length,
            timeout_seconds=600,
        )
        prompts = [[8 + (7 * i + j) % 100 for j in range(16)] for i in range(arguments.requests)]
        sampling = SamplingConfig(temperature=0.0, top_p=1.0, max_new_tokens=arguments.tokens)
        requests = [
            GenerationRequest(prompt_ids=tuple(ids), seed=0, max_new_tokens=arguments.tokens) for ids in prompts
        ]
        parameters = {"temperature": 0.0, "max_new_tokens": arguments.tokens, "stop_token_ids": [STOP]}
        bodies = [
            json.dumps({"input_ids": ids, "sampling_params": parameters, "return_logprob": True}).encode()
            for ids in prompts
        ]
        units = [[request] for request in requests]
        try:
            engine.publish(0)
            url = engine.pool.servers[0].client.url
            num_tokens = sum(len(c.token_ids) for _, answers in engine.generate(units, sampling) for c in answers)
            ours, bare, ratio = compare(
                lambda: list(engine.generate(units, sampling)),
                lambda: asyncio.run(bare_load(url, bodies)),
                pairs=arguments.pairs,
            )
        finally:
            engine.close()
    print(f"{len(requests)} responses, {num_tokens} tokens, {CONCURRENCY} in flight")
    print(
        f"client {ours:.2f} s ({num_tokens / ours:.0f} tokens/s), bare {bare:.2f} s ({num_tokens / bare:.0f} tokens/s)"
    )
    print(f"median ratio of pairs {ratio:.3f} (limit 1.05)")


if __name__ == "__main__":
    main()
