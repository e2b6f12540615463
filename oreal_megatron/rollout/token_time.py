"""Time of a token on a rollout server, at several numbers of responses at once."""

from __future__ import annotations

import asyncio
import json
import random
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

from oreal_megatron.config import GeometryConfig, SGLangConfig
from oreal_megatron.files import write_atomically
from oreal_megatron.rollout.build_sglang import server_settings
from oreal_megatron.servers.client import ServerClient, ServerLost
from oreal_megatron.servers.server_kinds import AttachedServer, LaunchedServer
from oreal_megatron.servers.server_process import choose_port, server_url

_BATCHES = (1, 32, 256)
"""Numbers of responses at once, up to rollout.sglang.max_concurrency."""
_PROMPT, _SHORT, _LONG = 128, 16, 144
"""Tokens of a prompt and of two responses to it, where the context has room. The difference between both times is that
of the tokens between, without reading prompts."""
_REPETITIONS = 3


def time_tokens(
    servers: SGLangConfig,
    geometry: GeometryConfig,
    *,
    dtype: str,
    max_sequence_length: int,
    model_path: str | None,
    url: str | None,
    directory: Path,
    progress: Callable[[str], None],
) -> tuple[int, dict[int, float]]:
    """Returns `token_seconds` of a running server, or of a server that is launched for it with random weights.

    geometry, dtype, max_sequence_length, model_path: see `build_sglang_engine`. url: of the running server; None:
    launch one. directory: for the launched server's config.json and log. progress: called with a note at each stage.

    Raises:
        ValueError: the server cannot start, does not fit the run, or cannot be timed.
        ServerLost: the server was lost while it was timed.
    """
    settings, described = server_settings(
        servers,
        geometry,
        directory=directory,
        dtype=dtype,
        stop_token_id=0,  # timed responses go on behind it
        max_sequence_length=max_sequence_length,
        model_path=model_path,
        run="measure",
    )
    server: LaunchedServer | AttachedServer
    if url is None:
        write_atomically(settings.launcher.model / "config.json", json.dumps(described))
        server = LaunchedServer(0, server_url(servers.host, choose_port(servers, 0)), settings)
    else:
        server = AttachedServer(0, url, settings)

    async def timed() -> tuple[int, dict[int, float]]:
        try:
            progress(f"waiting for the server at {server.url}")
            if url is not None:
                await server.client.describe()  # a running server answers at once
            await server.connect()
            if server.failure is not None:
                raise ValueError(server.failure)
            return await token_seconds(
                server.client,
                sorted({min(batch, servers.max_concurrency) for batch in _BATCHES}),
                vocab_size=geometry.vocab_size or 1,
                max_sequence_length=max_sequence_length,
                progress=progress,
            )
        except ServerLost as error:
            raise ServerLost(f"{error}{server.end_of_log()}") from error
        finally:
            await server.close()

    return asyncio.run(timed())


async def token_seconds(
    client: ServerClient,
    batches: Sequence[int],
    *,
    vocab_size: int,
    max_sequence_length: int,
    progress: Callable[[str], None] = lambda note: None,
) -> tuple[int, dict[int, float]]:
    """Returns the mean length of a timed sequence, and the seconds of a token by the number of responses at once.

    Each comes from the shortest of three measurements. vocab_size: token ids of the prompts are below it.
    max_sequence_length: limit of a prompt with its response. progress: called with a note before each number of
    responses.

    Raises:
        ValueError: the server ends responses early, or other requests disturb the measurement.
        ServerLost, RequestRefused: see ServerClient.
    """
    rng = random.Random(0)
    scale = min(max_sequence_length / (_PROMPT + _LONG), 1.0)
    prompt_tokens, short, long = (int(scale * tokens) for tokens in (_PROMPT, _SHORT, _LONG))

    async def seconds(batch: int, num_tokens: int) -> float:
        options = {"temperature": 1.0, "max_new_tokens": num_tokens, "ignore_eos": True}
        prompts = [[rng.randrange(vocab_size) for _ in range(prompt_tokens)] for _ in range(batch)]
        start = time.perf_counter()
        answers = await asyncio.gather(*(client.generate(uuid.uuid4().hex, prompt, options) for prompt in prompts))
        spent = time.perf_counter() - start
        if (shortest := min(len(answer.token_ids) for answer in answers)) < num_tokens:
            raise ValueError(
                f"{client.url} ended a response after {shortest} of {num_tokens} tokens, so the time of a token cannot "
                "be measured. Name a server that no other run uses, with room for the responses."
            )
        return spent

    found = {}
    for batch in batches:
        progress(f"timing tokens of {batch} responses at once")
        await seconds(batch, short)  # warm-up
        # Whatever else runs on the machine only adds to a time, so the shortest is the truest.
        shorter = min([await seconds(batch, short) for _ in range(_REPETITIONS)])
        longer = min([await seconds(batch, long) for _ in range(_REPETITIONS)])
        found[batch] = (longer - shorter) / (long - short)
        if found[batch] <= 0:
            raise ValueError(f"{client.url}: longer responses took no longer. Name a server that no other run uses.")
    return prompt_tokens + (short + long) // 2, found
