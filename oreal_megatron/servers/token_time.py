"""Time of a token on a running server, at several numbers of responses at once."""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections.abc import Callable, Sequence
from statistics import median

from oreal_megatron.servers.client import ServerClient

_PROMPT, _SHORT, _LONG = 128, 16, 144
"""Tokens of a prompt and of two responses to it, where the context has room. The difference between both times is that
of the tokens between, without reading prompts."""
_REPETITIONS = 3


async def token_seconds(
    client: ServerClient,
    batches: Sequence[int],
    *,
    vocab_size: int,
    max_sequence_length: int,
    progress: Callable[[str], None] = lambda note: None,
) -> tuple[int, dict[int, float]]:
    """Returns the mean length of a timed sequence, and the seconds of a token by the number of responses at once.

    Medians of three measurements. vocab_size: token ids of the prompts are below it. max_sequence_length: limit of a
    prompt with its response. progress: called with a note before each number of responses.

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
                "be measured; name a server that no other run uses, with room for the responses"
            )
        return spent

    found = {}
    for batch in batches:
        progress(f"timing tokens of {batch} responses at once")
        await seconds(batch, short)  # warm-up
        more = [-await seconds(batch, short) + await seconds(batch, long) for _ in range(_REPETITIONS)]
        found[batch] = median(more) / (long - short)
        if found[batch] <= 0:
            raise ValueError(f"{client.url}: longer responses took no longer; name a server that no other run uses")
    return prompt_tokens + (short + long) // 2, found
