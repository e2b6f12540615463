"""Requests spread over the servers of the 32B setting: 16 servers, 8 replicas, 1,024 requests, in virtual time."""

from __future__ import annotations

import random

import pytest

from benchmarks.spread import SimulatedClient, generated_by
from oreal_megatron.types import GenerationRequest
from tests.fake_sglang import sglang_config

SERVERS, SAMPLES, LIMIT = 16, 16, 14_000
TOKEN_SECONDS = 0.008


def clients_after(
    *, num_replicas: int, num_prompts: int, max_concurrency: int, seed: int = 3, num_down: int = 0
) -> list[SimulatedClient]:
    """The servers' clients after `num_replicas` pools have generated their groups at the same time.

    num_down: number of the servers, counted from the first, that do not answer.
    """
    random_lengths = random.Random(seed)
    num_requests = num_replicas * num_prompts * SAMPLES
    lengths = [min(int(random_lengths.lognormvariate(7.5, 0.6)) + 1, LIMIT) for _ in range(num_requests)]
    clients = [SimulatedClient(number, lengths, lambda at_once: TOKEN_SECONDS) for number in range(SERVERS)]
    for client in clients[:num_down]:
        client.is_up = False
    config = sglang_config(max_concurrency=max_concurrency, health_seconds=60.0, startup_seconds=600.0)
    prompts = [range(replica * num_prompts, (replica + 1) * num_prompts) for replica in range(num_replicas)]
    generated_by(clients, config, [[r for prompt in mine for r in requests_of(prompt)] for mine in prompts])
    return clients


def requests_of(prompt: int, expected_tokens: float | None = None) -> list[GenerationRequest]:
    """The requests for the samples of a prompt."""
    return [
        GenerationRequest(
            prompt_ids=(5, prompt),
            seed=prompt * SAMPLES + sample,
            max_new_tokens=LIMIT,
            expected_tokens=expected_tokens,
        )
        for sample in range(SAMPLES)
    ]


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


@pytest.mark.parametrize(("is_known", "seconds"), [(False, 50.0), (True, 40.0)])
def test_long_responses_begin_before_the_rest_of_shorter_groups(is_known, seconds):
    # Two servers with eight places each: 16 responses of 1,000 tokens (10 s), 16 of 2,000 tokens.
    lengths = [1000] * SAMPLES + [2000] * SAMPLES
    clients = [SimulatedClient(number, lengths, lambda at_once: 0.01) for number in range(2)]
    prompts = [1, 0] if is_known else [0, 1]
    requests = [r for p in prompts for r in requests_of(p, lengths[p * SAMPLES] if is_known else None)]
    took = generated_by(clients, sglang_config(max_concurrency=6, health_seconds=1e6), [requests])
    assert took == pytest.approx(seconds)
