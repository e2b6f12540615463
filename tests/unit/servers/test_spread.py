"""Requests spread over the servers of the 32B setting: 16 servers, 8 replicas, 1,024 requests, in virtual time."""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter
from types import SimpleNamespace

import pytest

from oreal_megatron.config import SamplingConfig
from oreal_megatron.servers.client import Generated, ServerDescription, ServerLost
from oreal_megatron.servers.pool import ServerPool
from oreal_megatron.servers.server import ServerSettings
from oreal_megatron.types import GenerationRequest
from tests.fake_sglang import STOP, sglang_config

SERVERS, SAMPLES, LIMIT = 16, 16, 14_000
TOKEN_SECONDS = 0.008
SAMPLING = SamplingConfig(temperature=1.0, top_p=1.0, max_new_tokens=LIMIT)


class VirtualClockLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next timer, so that hours of sleep take no time."""

    _now = 0.0

    def time(self) -> float:
        return self._now

    def _run_once(self) -> None:
        if not self._ready and self._scheduled:  # type: ignore[attr-defined]
            self._now = max(self._now, self._scheduled[0]._when)  # type: ignore[attr-defined]
        super()._run_once()  # type: ignore[misc]


class SleepingClient:
    """A server's client whose responses have the length that `lengths` has for the request's seed."""

    def __init__(self, number: int, lengths: list[int]):
        self.url = f"http://server-{number}"
        self._lengths = lengths
        self.num_tokens = 0
        self.prompts: Counter[tuple[int, ...]] = Counter()
        self.at_once = self.most_at_once = 0
        self.is_up = True
        self.first_seconds = math.inf
        """Time of the first request on the clock of the loop."""

    async def describe(self) -> ServerDescription:
        assert not self.is_up, "the other process has said that the server has the weights"
        await asyncio.sleep(10.0)
        raise ServerLost("no answer to a connection")

    async def is_healthy(self, seconds: float) -> bool:
        return True

    async def generate(self, rid: str, prompt_ids: tuple[int, ...], sampling: dict[str, int]) -> Generated:
        self.first_seconds = min(self.first_seconds, asyncio.get_running_loop().time())
        self.prompts[prompt_ids] += 1
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        length = self._lengths[sampling["sampling_seed"]]
        await asyncio.sleep(length * TOKEN_SECONDS)
        self.at_once -= 1
        self.num_tokens += length
        tokens = (*[10] * (length - 1), STOP)
        finish = {"type": "stop", "matched": STOP}
        return Generated(token_ids=tokens, logprobs=(-1.0,) * length, finish=finish, weight_labels=frozenset({"0-run"}))


def clients_after(
    *, num_replicas: int, num_prompts: int, max_concurrency: int, seed: int = 3, num_down: int = 0
) -> list[SleepingClient]:
    """The servers' clients after `num_replicas` pools have generated their groups at the same time.

    num_down: number of the servers, counted from the first, that do not answer.
    """
    random_lengths = random.Random(seed)
    num_requests = num_replicas * num_prompts * SAMPLES
    lengths = [min(int(random_lengths.lognormvariate(7.5, 0.6)) + 1, LIMIT) for _ in range(num_requests)]
    clients = [SleepingClient(number, lengths) for number in range(SERVERS)]
    for client in clients[:num_down]:
        client.is_up = False
    config = sglang_config(max_concurrency=max_concurrency, health_seconds=60.0, startup_seconds=600.0)
    settings = ServerSettings(config=config, launcher=SimpleNamespace(), check=lambda url, found: None, run="run")  # type: ignore[arg-type]
    done: Counter[int] = Counter()

    async def replica(number: int) -> None:
        pool = ServerPool(settings, stop_token_id=STOP, config_json={}, replica=number, num_replicas=num_replicas)
        await pool.follow(0, "0-run", {client.url: client.is_up for client in clients})
        for server, client in zip(pool.servers, clients, strict=True):
            server.client = client  # type: ignore[assignment]
        first = number * num_prompts
        requests = [
            GenerationRequest(prompt_ids=(5, prompt), seed=prompt * SAMPLES + sample, max_new_tokens=LIMIT)
            for prompt in range(first, first + num_prompts)
            for sample in range(SAMPLES)
        ]
        await pool.generate(requests, SAMPLING, lambda index, _: done.update([first * SAMPLES + index]))

    async def all_replicas() -> None:
        await asyncio.gather(*(replica(number) for number in range(num_replicas)))

    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        runner.run(all_replicas())
    assert done == Counter(range(num_requests))
    return clients


@pytest.mark.parametrize("seed", range(5))
def test_tokens_are_even_where_servers_are_refilled(seed):
    clients = clients_after(num_replicas=8, num_prompts=8, max_concurrency=8, seed=seed)
    tokens = [client.num_tokens for client in clients]
    assert max(client.most_at_once for client in clients) <= 8
    assert max(tokens) <= 1.1 * sum(tokens) / SERVERS


def test_a_server_has_whole_groups_where_everything_is_in_flight():
    clients = clients_after(num_replicas=8, num_prompts=8, max_concurrency=256)
    # 64 requests are the samples of four prompts, each of which the server reads once.
    assert [list(client.prompts.values()) for client in clients] == [[SAMPLES] * 4] * SERVERS


def test_groups_are_split_where_servers_would_be_idle():
    clients = clients_after(num_replicas=1, num_prompts=8, max_concurrency=256)
    assert [list(client.prompts.values()) for client in clients] == [[8 * SAMPLES // SERVERS]] * SERVERS


@pytest.mark.parametrize("num_down", [0, 1])
def test_a_server_that_is_down_costs_no_time(num_down):
    clients = clients_after(num_replicas=8, num_prompts=8, max_concurrency=16, num_down=num_down)
    assert {client.first_seconds for client in clients[num_down:]} == {0.0}
    assert not any(client.prompts for client in clients[:num_down])
