"""Updates, device turns and the life of a pool's servers, against fake SGLang servers."""

from __future__ import annotations

import asyncio

import pytest

from oreal_megatron.servers.request_queue import NoServerError
from oreal_megatron.servers.server import ServerState
from oreal_megatron.servers.server_process import NO_WEIGHTS, offloaded_mark
from tests.fake_sglang import free_port, response
from tests.unit.servers.conftest import generate, on_loop, requests_of, until, update

COLOCATED = {"placement": "colocated", "transport": "ipc"}


def states(pool):
    return [server.state for server in pool.servers]


@on_loop
async def test_first_update_launches_every_server_and_labels_it(fakes):
    pool = fakes.pool(num_servers=2)
    assert await update(pool, 3) == [0, 1]
    assert [fakes.last(index).label for index in (0, 1)] == [pool.label(3)] * 2 and sum(pool.has_weights.values()) == 2
    assert (fakes.settings().launcher.model / "config.json").is_file()
    await pool.close()
    await until(lambda: all(fake.exit_code is not None for _, fake in fakes.started))


@on_loop
async def test_label_is_unique_to_the_run(fakes):
    assert fakes.pool().label(1) != fakes.pool().label(1)


@on_loop
async def test_server_of_a_live_run_is_refused_to_another_until_that_run_ends(fakes):
    fake = fakes.server()
    live, other = fakes.pool(fake.url, run="live"), fakes.pool(fake.url, run="other")
    await update(live, 3)
    label = fake.label
    with pytest.raises(NoServerError, match=rf"{fake.url}: .*weights {label} of another run.*update_weight_version"):
        await update(other, 0)
    assert fake.label == label and sum(live.has_weights.values()) == 1
    assert len(await generate(live, requests_of(4))) == 4
    await other.close()
    assert fake.label == label
    await live.close()
    assert fake.label == NO_WEIGHTS
    late = fakes.pool(fake.url, run="other")
    assert await update(late, 0) == [0]
    await late.close()


@on_loop
async def test_restarted_run_takes_the_servers_that_it_left_when_it_was_killed(fakes):
    fake = fakes.server()
    killed, again = fakes.pool(fake.url), fakes.pool(fake.url)
    await update(killed, 3)
    assert await update(again, 3) == [0]  # the killed process may have had other weights of that version
    assert fake.label == again.label(3) != killed.label(3)
    await again.close()
    await killed.close()


@on_loop
async def test_first_update_raises_if_one_server_cannot_be_used(fakes):
    good = fakes.server()
    pool = fakes.pool(good.url, fakes.server(info={"tp_size": 2}).url)
    with pytest.raises(NoServerError, match=r"1 of 2.*\n.*rollout\.sglang\.tensor"):
        await update(pool, 0)
    assert "/pause_generation" not in good.calls
    await pool.close()


@on_loop
async def test_first_update_raises_if_one_server_does_not_take_the_weights(fakes):
    pool = fakes.pool(fakes.server().url, fakes.server().url)
    with pytest.raises(NoServerError, match="audit failed"):
        await update(pool, 0, failures={1: "audit failed"})
    assert states(pool) == [ServerState.CONNECTED, ServerState.FAILED]
    await pool.close()


@on_loop
async def test_later_update_goes_on_without_a_server_that_failed(fakes):
    pool = fakes.pool(fakes.server().url, fakes.server().url)
    await update(pool, 0)
    await update(pool, 1, failures={1: "audit failed"})
    assert sum(pool.has_weights.values()) == 1 and pool.servers[0].label == pool.label(1)
    await until(lambda: pool.servers[1].state is ServerState.CONNECTED)
    assert await update(pool, 2) == [0, 1] and sum(pool.has_weights.values()) == 2
    await pool.close()


@on_loop
async def test_update_sends_again_to_the_server_that_failed(fakes):
    pool = fakes.pool(fakes.server().url, fakes.server().url)
    await update(pool, 0)
    await pool.connect(1, wait=False)
    first, second = await pool.begin_update()
    await pool.finish_update([first], {})
    assert second.state is ServerState.UPDATING and sum(pool.has_weights.values()) == 1
    await pool.finish_update([second], {})
    assert sum(pool.has_weights.values()) == 2
    await pool.close()


@on_loop
async def test_update_of_the_same_weights_takes_only_servers_without_them(fakes):
    pool = fakes.pool(num_servers=2)
    await update(pool, 1)
    fakes.kill(fakes.last(1))
    await until(lambda: len(fakes.started) == 3 and pool.servers[1].is_up and not pool.servers[1].is_down)
    assert await update(pool, 1, wait=True) == [1] and sum(pool.has_weights.values()) == 2
    await pool.close()


@on_loop
async def test_update_does_not_wait_for_a_starting_server(fakes):
    pool = fakes.pool(num_servers=2, startup_seconds=5.0)
    await update(pool, 0)
    fakes.prepare = lambda index, fake: fake.break_("/model_info", "delay", 0.5, times=1)
    fakes.kill(fakes.last(1))
    await until(lambda: len(fakes.started) == 3)
    assert pool.servers[1].is_busy
    assert await update(pool, 1) == [0]
    assert await update(pool, 2, wait=True) == [0, 1]
    await pool.close()


@on_loop
async def test_lost_server_restarts_although_no_request_waits(fakes):
    pool = fakes.pool()
    await update(pool, 0)
    fakes.kill(fakes.last(0))
    await until(lambda: len(fakes.started) == 2 and pool.servers[0].state is ServerState.CONNECTED)
    await pool.close()


@on_loop
async def test_update_without_any_server_left_raises(fakes):
    fake = fakes.server()
    pool = fakes.pool(fake.url, startup_seconds=1.0)
    await update(pool, 0)
    fakes.kill(fake)
    await update(pool, 1)
    assert sum(pool.has_weights.values()) == 0
    await until(lambda: states(pool) == [ServerState.FAILED])
    with pytest.raises(NoServerError, match="1 of 1"):
        await update(pool, 2)
    await pool.close()


@on_loop
async def test_two_runs_share_an_attached_server(fakes):
    fake = fakes.server()
    one, other = fakes.pool(fake.url), fakes.pool(fake.url)
    await update(one, 0)
    await update(other, 5)
    reported = asyncio.Event()
    one.on_no_current_weights = reported.set
    running = asyncio.create_task(generate(one, requests_of(3)))
    await asyncio.wait_for(reported.wait(), 3)
    assert await update(one, 0, wait=True) == [0]
    assert [c.token_ids for c in await running] == [response(r.prompt_ids, 10) for r in requests_of(3)]
    await one.close()
    await other.close()
    assert fake.exit_code is None


@on_loop
async def test_offloaded_pool_leaves_a_mark_and_starts_no_server(fakes):
    pool = fakes.pool(num_servers=2, **COLOCATED)
    mark = offloaded_mark(fakes.settings().launcher.model)
    await update(pool, 0)
    assert not mark.exists() and states(pool) == [ServerState.UPDATED] * 2
    await pool.onload()
    assert states(pool) == [ServerState.CONNECTED] * 2
    await pool.offload()
    assert mark.exists() and states(pool) == [ServerState.OFFLOADED] * 2
    fakes.kill(fakes.last(0))
    await asyncio.sleep(0.1)
    assert len(fakes.started) == 2
    assert await update(pool, 1) == [0, 1]
    assert not mark.exists() and len(fakes.started) == 3 and sum(pool.has_weights.values()) == 2
    await pool.close()


@on_loop
async def test_offload_waits_for_a_starting_server(fakes):
    pool = fakes.pool(**COLOCATED)
    await update(pool, 0)
    await pool.onload()
    fakes.prepare = lambda index, fake: fake.break_("/model_info", "delay", 0.3, times=1)
    fakes.kill(fakes.last(0))
    await until(lambda: len(fakes.started) == 2)
    await pool.offload()
    assert states(pool) == [ServerState.OFFLOADED] and fakes.last(0).released == {"weights", "kv_cache"}
    await pool.close()


@on_loop
async def test_offload_without_any_server_left_raises(fakes):
    fake = fakes.server()
    pool = fakes.pool(fake.url, startup_seconds=1.0, **COLOCATED)
    await update(pool, 0)
    fakes.kill(fake)
    await pool.servers[0].report_lost(ConnectionError("gone"))
    await until(lambda: states(pool) == [ServerState.FAILED])
    with pytest.raises(NoServerError):
        await pool.offload()
    await pool.close()


async def killed_and_following(fakes, num_servers, **options):
    """A pool of attached servers at version 1, the last of which died before, and the pool of another process."""
    servers = [fakes.server() for _ in range(num_servers)]
    owner, follower = (fakes.pool(*(server.url for server in servers), **options) for _ in range(2))
    await update(owner, 0)
    fakes.kill(servers[-1])
    await update(owner, 1)
    await follower.follow(1, owner.label(1), owner.has_weights)
    return owner, follower, servers


@on_loop
async def test_a_server_that_is_down_gets_no_request_of_another_process_and_is_not_waited_for(fakes):
    owner, follower, servers = await killed_and_following(fakes, 16)
    assert list(owner.has_weights.values()) == [True] * 15 + [False]
    assert states(follower) == [ServerState.CONNECTED] * 15 + [ServerState.LOST]
    # Servers answer nothing but requests: no label is asked for, and nothing can be waited for.
    for server in servers[:-1]:
        server.break_("/model_info", "hang")
    await generate(follower, requests_of(64))
    num_requests = [len(server.prompts) for server in servers]
    assert min(num_requests[:-1]) >= 4 and num_requests[-1] == follower.num_retries == 0
    await follower.close()
    await owner.close()


@on_loop
async def test_a_server_that_comes_back_during_generation_is_used_by_another_process(fakes):
    owner, follower, servers = await killed_and_following(fakes, 2, max_concurrency=1)
    back = servers[1]
    servers[0].token_seconds = 0.02
    running = asyncio.create_task(generate(follower, requests_of(12)))
    await until(lambda: servers[0].prompts)
    back.label = owner.label(1)  # the host lost its link, not its servers
    fakes.run(back.start())
    await running
    assert back.prompts and follower.num_retries == 0
    assert states(follower) == [ServerState.CONNECTED] * 2
    await follower.close()
    await owner.close()


@on_loop
async def test_following_pool_uses_the_labels_of_another_process(fakes):
    owner, follower = fakes.pool(num_servers=2), fakes.pool()
    for version in (0, 1):
        await update(owner, version)
        await follower.follow(version, owner.label(version), owner.has_weights)
        found = await generate(follower, requests_of(4))
        assert {span.version for c in found for span in c.weight_spans} == {version}
    assert len(fakes.started) == 2
    await follower.close()
    await owner.close()


@on_loop
async def test_closing_ends_a_connect_that_waits(fakes):
    pool = fakes.pool(f"http://127.0.0.1:{free_port()}", startup_seconds=60.0)
    opening = asyncio.create_task(pool.connect(0, wait=False))
    await asyncio.sleep(0.05)
    opening.cancel()
    await asyncio.gather(opening, return_exceptions=True)
    await asyncio.wait_for(pool.close(), 2)
    assert opening.cancelled() and not pool.servers[0].is_busy
