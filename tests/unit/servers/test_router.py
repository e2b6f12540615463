"""Requests reach servers with the current weights and are answered once, against fake SGLang servers."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from oreal_megatron.servers.client import RequestRefused
from oreal_megatron.servers.request_queue import NoServerError
from oreal_megatron.servers.server import ServerState
from oreal_megatron.types import FinishReason, WeightSpan
from tests.fake_sglang import STOP, response
from tests.unit.servers.conftest import generate, on_loop, requests_of, until, update


def expected(requests):
    return [response(request.prompt_ids, request.max_new_tokens) for request in requests]


def tokens(completions):
    return [completion.token_ids for completion in completions]


async def attached(fakes, num=1, **options):
    """A pool of attached servers at version 0."""
    servers = [fakes.server() for _ in range(num)]
    pool = fakes.pool(*(server.url for server in servers), **options)
    await update(pool, 0)
    return pool, servers


@on_loop
async def test_requests_are_answered_in_order_with_their_version(fakes):
    pool, _ = await attached(fakes)
    requests = requests_of(9)
    found = await generate(pool, requests)
    assert tokens(found) == expected(requests) and pool.num_retries == 0
    assert all(c.finish_reason is FinishReason.LENGTH for c in found)
    assert all(c.weight_spans == (WeightSpan(version=0, start=0, end=10),) for c in found)
    assert await generate(pool, []) == []
    await pool.close()


@on_loop
async def test_requests_end_at_tokens_of_their_own(fakes):
    pool, _ = await attached(fakes)
    requests = requests_of(3)
    (first, second, third) = expected(requests)
    requests[1] = replace(requests[1], stop_token_ids=(second[4],))
    found = await generate(pool, requests)
    end = second.index(second[4]) + 1
    assert tokens(found) == [first, second[:end], third]
    assert [c.finish_reason is FinishReason.STOP for c in found] == [False, True, False]
    await pool.close()


@on_loop
async def test_requests_of_a_dead_server_come_before_those_asked_for_later(fakes):
    pool, (lost, left) = await attached(fakes, 2, max_concurrency=2)
    for server in (lost, left):
        server.token_seconds = 0.02
    prompts = [request.prompt_ids for request in requests_of(8)]
    requests = [request for request in requests_of(8, 12) for _ in range(3)]
    running = asyncio.create_task(generate(pool, requests))
    await until(lambda: len(lost.prompts) == 2 and len(left.prompts) == 2)
    fakes.kill(lost)
    assert tokens(await running) == expected(requests)
    under_way, placed = set(left.prompts[:2]), left.prompts[2:]
    came_back = [ids for ids in prompts if ids in lost.prompts]
    # A place at a time becomes free, and goes to the oldest prompt of the lost server until it has none left.
    order = [prompts.index(ids) for ids in placed if ids not in under_way]
    assert [prompts.index(ids) for ids in came_back] == sorted(set(order))[: len(came_back)]
    assert order == sorted(order)
    await pool.close()


@on_loop
async def test_requests_of_a_dead_server_go_to_the_others(fakes):
    pool, servers = await attached(fakes, 2)
    for server in servers:
        server.token_seconds = 0.02
    requests = requests_of(8, 12)
    running = asyncio.create_task(generate(pool, requests))
    await until(lambda: servers[1].prompts or servers[0].prompts)
    await asyncio.sleep(0.05)
    busy = servers[0] if servers[0].prompts else servers[1]
    fakes.kill(busy)
    assert tokens(await running) == expected(requests) and pool.num_retries > 0
    await pool.close()


@on_loop
async def test_launched_server_that_dies_restarts_and_is_sent_the_weights(fakes):
    pool = fakes.pool()
    await update(pool, 0)
    fakes.last(0).token_seconds = 0.02
    reported = asyncio.Event()
    pool.on_no_current_weights = reported.set
    running = asyncio.create_task(generate(pool, requests_of(4)))
    await until(lambda: len(fakes.last(0).prompts) == 4)
    fakes.kill(fakes.last(0))
    await asyncio.wait_for(reported.wait(), 5)
    assert len(fakes.started) == 2 and not fakes.last(0).prompts
    await update(pool, 0, wait=True)
    assert tokens(await running) == expected(requests_of(4)) and pool.num_retries == 4
    await pool.close()


@on_loop
async def test_no_current_weights_is_reported_once_an_update(fakes):
    pool = fakes.pool()
    await update(pool, 0)
    reports = []
    pool.on_no_current_weights = lambda: reports.append(1)
    fakes.kill(fakes.last(0))
    await until(lambda: len(fakes.started) == 2 and pool.servers[0].state is ServerState.CONNECTED)
    running = asyncio.create_task(generate(pool, requests_of(1)))
    await until(lambda: reports)
    await asyncio.sleep(0.1)
    assert len(reports) == 1
    await update(pool, 0, wait=True)
    await running
    await pool.close()


@pytest.mark.parametrize("how", ["drop", "part", "status"])
@on_loop
async def test_broken_answers_are_asked_for_again(fakes, how):
    pool, (server,) = await attached(fakes)
    server.break_("/generate", how, 500, times=1)
    assert tokens(await generate(pool, requests_of(3))) == expected(requests_of(3))
    assert pool.num_retries > 0
    await pool.close()


@on_loop
async def test_silent_server_is_lost_after_health_seconds(fakes):
    pool, servers = await attached(fakes, 2, health_seconds=0.4)
    for server in servers:
        server.token_seconds = 0.02
    running = asyncio.create_task(generate(pool, requests_of(8)))
    await until(lambda: servers[0].prompts or servers[1].prompts)
    silent = servers[0] if servers[0].prompts else servers[1]
    silent.token_seconds = 60
    silent.break_("/health", "hang")
    silent.break_("/model_info", "hang")
    assert tokens(await running) == expected(requests_of(8))
    assert pool.servers[servers.index(silent)].state is not ServerState.CONNECTED
    await pool.close()


@on_loop
async def test_slow_server_that_answers_health_checks_is_kept(fakes):
    pool, (server,) = await attached(fakes, health_seconds=0.6)
    server.break_("/generate", "delay", 1.0)
    await generate(pool, requests_of(2))
    assert pool.num_retries == 0 and pool.servers[0].state is ServerState.CONNECTED
    await pool.close()


@on_loop
async def test_stale_answers_are_discarded(fakes, caplog):
    pool, servers = await attached(fakes, 2)
    servers[0].answer_label = "0-other"
    found = await generate(pool, requests_of(8))
    assert tokens(found) == expected(requests_of(8)) and servers[1].prompts
    assert "0-other" in caplog.text or not servers[0].prompts
    await pool.close()


@on_loop
async def test_stale_launched_server_gets_the_weights_again(fakes):
    pool = fakes.pool()
    await update(pool, 0)
    fakes.last(0).label = "another run's"
    reported = asyncio.Event()
    pool.on_no_current_weights = reported.set
    running = asyncio.create_task(generate(pool, requests_of(3)))
    await asyncio.wait_for(reported.wait(), 5)
    assert await update(pool, 0, wait=True) == [0]
    assert tokens(await running) == expected(requests_of(3)) and len(fakes.started) == 1
    await pool.close()


@on_loop
async def test_abort_before_the_first_token_is_an_empty_partial(fakes):
    pool, (server,) = await attached(fakes)
    server.token_seconds = 30
    found = await generate(pool, requests_of(2), lambda: bool(server.prompts))
    assert tokens(found) == [(), ()] and pool.num_retries == 0
    await pool.close()


@on_loop
async def test_request_that_loses_four_servers_raises(fakes):
    pool, servers = await attached(fakes, 2)
    for server in servers:
        server.break_("/generate", "drop")
    pool_error = r"lost 4 times|2 of 2"
    with pytest.raises(NoServerError, match=pool_error):
        await generate(pool, requests_of(1))
    await pool.close()


@on_loop
async def test_request_that_loses_every_restart_raises(fakes):
    pool = fakes.pool(max_restarts=10)
    fakes.prepare = lambda index, fake: fake.break_("/generate", "drop")
    await update(pool, 0)
    resending = []
    loop = asyncio.get_running_loop()
    pool.on_no_current_weights = lambda: resending.append(loop.create_task(update(pool, 0, wait=True)))
    with pytest.raises(NoServerError, match="a prompt of 2 tokens was lost 4 times"):
        await generate(pool, requests_of(1))
    assert len(resending) == 3
    await pool.close()


@on_loop
async def test_refused_request_raises_and_is_not_sent_again(fakes):
    pool, (server,) = await attached(fakes)
    server.break_("/generate", "status", 400)
    with pytest.raises(RequestRefused, match="400"):
        await generate(pool, requests_of(1))
    assert pool.num_retries == 0 and pool.servers[0].state is ServerState.CONNECTED
    await pool.close()


@on_loop
async def test_response_that_ends_at_another_stop_token_raises(fakes):
    pool, (server,) = await attached(fakes)
    server.stop_after, server.stop_token = 3, STOP + 1
    with pytest.raises(RequestRefused, match=r"prompt\.stop_token"):
        await generate(pool, requests_of(1))
    await pool.close()


@on_loop
async def test_response_that_stops_is_complete(fakes):
    pool, (server,) = await attached(fakes)
    server.stop_after = 4
    (found,) = await generate(pool, requests_of(1))
    assert found.finish_reason is FinishReason.STOP and found.token_ids[-1] == STOP and len(found.token_ids) == 5
    await pool.close()


@on_loop
async def test_abort_by_another_client_is_asked_for_again(fakes):
    pool, (server,) = await attached(fakes)
    server.token_seconds = 0.02
    running = asyncio.create_task(generate(pool, requests_of(3)))
    await until(lambda: len(server.prompts) == 3)
    await asyncio.sleep(0.05)
    server.abort()
    assert tokens(await running) == expected(requests_of(3)) and pool.num_retries > 0
    await pool.close()


@on_loop
async def test_early_stop_returns_partials_that_continue_under_new_weights(fakes):
    pool, (server,) = await attached(fakes)
    server.token_seconds = 0.01
    requests = requests_of(6, 100)
    requests[0] = replace(requests[0], max_new_tokens=3)
    first = await generate(pool, requests, lambda: len(server.prompts) > 4)
    assert first[0].finish_reason is FinishReason.LENGTH
    partial = [c for c in first if c.finish_reason is None and c.token_ids]
    assert partial and first[-1].token_ids == ()  # the last request was never sent
    await update(pool, 1)
    server.token_seconds = 0.001
    asked = len(server.prompts)
    second = await generate(pool, [replace(r, partial=c) for r, c in zip(requests, first, strict=True)])
    assert tokens(second) == expected(requests) and second[0] == first[0]
    assert len(server.prompts) == asked + 5
    for before, after in zip(first[1:], second[1:], strict=True):
        cut = len(before.token_ids)
        spans = (WeightSpan(version=0, start=0, end=cut),) if cut else ()
        assert after.weight_spans == (*spans, WeightSpan(version=1, start=cut, end=100))
        assert after.logprobs[:cut] == before.logprobs
    await pool.close()


@on_loop
async def test_early_stop_does_not_wait_for_a_lost_server(fakes):
    pool, (server,) = await attached(fakes, startup_seconds=1.0)
    server.token_seconds = 0.02
    is_enough = []
    running = asyncio.create_task(generate(pool, requests_of(4, 100), lambda: bool(is_enough)))
    await until(lambda: server.prompts)
    is_enough.append(True)
    fakes.kill(server)
    assert all(c.finish_reason is None for c in await running)
    await pool.close()


@on_loop
async def test_error_of_the_condition_for_an_early_stop_is_raised(fakes):
    pool, _ = await attached(fakes)

    def is_enough():
        raise ConnectionError("the store of the count is gone")

    with pytest.raises(ConnectionError, match="store of the count"):
        await generate(pool, requests_of(2, 2000), is_enough)
    await pool.close()


@on_loop
async def test_no_server_left_raises_with_the_reason_of_each(fakes):
    pool, servers = await attached(fakes, 2, startup_seconds=1.0)
    running = asyncio.create_task(generate(pool, requests_of(4, 200)))
    await until(lambda: servers[0].prompts or servers[1].prompts)
    for server in servers:
        fakes.kill(server)
    with pytest.raises(NoServerError, match=r"2 of 2 rollout servers.*\n.*startup_seconds.*\n.*startup_seconds"):
        await running
    await pool.close()


@on_loop
async def test_cancelled_generation_leaves_the_pool_usable(fakes):
    pool, (server,) = await attached(fakes)
    server.token_seconds = 0.02
    running = asyncio.create_task(generate(pool, requests_of(4, 100)))
    await until(lambda: server.prompts)
    running.cancel()
    assert isinstance((await asyncio.gather(running, return_exceptions=True))[0], asyncio.CancelledError)
    server.token_seconds = 0.001
    assert tokens(await generate(pool, requests_of(2))) == expected(requests_of(2))
    await pool.close()


@on_loop
async def test_server_that_answers_between_losses_is_kept(fakes):
    pool, (server,) = await attached(fakes)
    for _ in range(3):
        server.break_("/generate", "drop", times=1)
        assert tokens(await generate(pool, requests_of(1))) == expected(requests_of(1))
    assert pool.num_retries == 3 and pool.servers[0].failure is None
    await pool.close()
