"""Fake SGLang servers, and the steps of a weight update on a pool of them."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from oreal_megatron.config import SamplingConfig
from oreal_megatron.servers.pool import ServerPool
from oreal_megatron.types import Completion, GenerationRequest
from tests.fake_sglang import FakeServers, fake_servers

GREEDY = SamplingConfig(temperature=0.0, top_p=1.0, max_new_tokens=20)


@pytest.fixture
def fakes(tmp_path: Path) -> Iterator[FakeServers]:
    with fake_servers(tmp_path) as opened:
        yield opened


def requests_of(num: int, num_tokens: int = 10) -> list[GenerationRequest]:
    return [GenerationRequest(prompt_ids=(5, 20 + i), seed=i, max_new_tokens=num_tokens) for i in range(num)]


async def update(
    pool: ServerPool, version: int, *, wait: bool = False, failures: Mapping[int, str] | None = None
) -> list[int]:
    """Updates the pool and returns the indices of the servers that were paused. failures: reasons by index."""
    await pool.connect(version, wait=wait)
    servers = await pool.begin_update()
    reasons = {server.url: (failures or {})[server.index] for server in servers if server.index in (failures or {})}
    await pool.finish_update(servers, reasons)
    return [server.index for server in servers]


async def generate(pool: ServerPool, requests: list[GenerationRequest], is_enough=None) -> list[Completion]:  # type: ignore[no-untyped-def]
    """Generates all requests; a request that is completed twice fails the test."""
    found: dict[int, Completion] = {}

    def completed(index: int, completion: Completion) -> None:
        assert index not in found
        found[index] = completion

    await asyncio.wait_for(pool.generate(requests, GREEDY, completed, is_enough), 15)
    assert len(found) == len(requests)
    return [found[index] for index in range(len(requests))]


async def until(is_so, seconds: float = 5.0) -> None:  # type: ignore[no-untyped-def]
    """Waits until a condition holds."""
    async with asyncio.timeout(seconds):
        while not is_so():
            await asyncio.sleep(0.005)


def on_loop(test):  # type: ignore[no-untyped-def]
    """Runs a test's coroutine on an event loop."""

    @functools.wraps(test)
    def run(*arguments, **options):  # type: ignore[no-untyped-def]
        return asyncio.run(test(*arguments, **options))

    return run
