"""States of a server and the calls that change them, against a fake SGLang."""

from __future__ import annotations

import asyncio
import logging

import pytest

from oreal_megatron.servers.client import ServerLost
from oreal_megatron.servers.server import ServerState
from oreal_megatron.servers.server_kinds import AttachedServer, LaunchedServer, RemoteServer
from tests.fake_sglang import free_port
from tests.unit.servers.conftest import on_loop, until

UPDATE = ["/pause_generation", "/begin_weight_update", "/end_weight_update"]
CONTINUE = ["/flush_cache", "/update_weight_version", "/continue_generation"]
OFFLOAD = ["/pause_generation", "/update_weight_version asleep", "/release_memory_occupation kv_cache weights"]


def launched(fakes, **options):
    return LaunchedServer(0, f"http://127.0.0.1:{free_port()}", fakes.settings(**options))


def attached(fakes, fake, **options):
    return AttachedServer(0, fake.url, fakes.settings(urls=(fake.url,), **options))


def colocated(fakes, fake):
    return attached(fakes, fake, placement="colocated", transport="ipc")


async def updated(server, label="1-a", failure=None, is_first=False):
    assert await server.pause_for_update()
    assert server.state is ServerState.UPDATING
    await server.finish_update(label, failure, is_first=is_first)


@on_loop
async def test_launched_server_connects_with_unknown_weights(fakes):
    server = launched(fakes)
    assert server.state is ServerState.NEW and server.is_down
    await server.connect()
    assert (server.state, server.label, server.is_down) == (ServerState.CONNECTED, None, False)
    await server.connect()
    assert len(fakes.started) == 1
    await server.close()
    assert fakes.last(0).exit_code is not None or await until(lambda: fakes.last(0).exit_code) is None


@on_loop
async def test_attached_server_connects_with_its_label_and_outlives_the_run(fakes):
    fake = fakes.server(label="5-x")
    server = attached(fakes, fake)
    await server.connect()
    assert (server.state, server.label) == (ServerState.CONNECTED, "5-x")
    await server.close()
    assert fake.exit_code is None


@on_loop
async def test_update_pauses_and_continues_in_order(fakes):
    fake = fakes.server()
    server = attached(fakes, fake)
    await server.connect()
    fake.calls.clear()
    await updated(server)
    assert fake.calls == [*UPDATE, *CONTINUE] and fake.label == "1-a"
    assert (server.state, server.label, server.is_busy) == (ServerState.CONNECTED, "1-a", False)
    await server.close()


@on_loop
async def test_server_is_busy_for_others_during_an_update(fakes):
    fake = fakes.server()
    server = attached(fakes, fake)
    await server.connect()
    await server.pause_for_update()
    connecting = asyncio.create_task(server.connect())
    await asyncio.sleep(0.05)
    assert server.is_busy and not connecting.done()
    await server.finish_update("1-a", None, is_first=False)
    await asyncio.wait_for(connecting, 2)
    await server.close()


@on_loop
async def test_attached_server_stays_usable_after_a_failed_update(fakes, caplog):
    caplog.set_level(logging.WARNING, logger="oreal_megatron")
    fake = fakes.server()
    server = attached(fakes, fake)
    await server.connect()
    await updated(server, failure="audit failed")
    assert (server.state, server.label) == (ServerState.LOST, None)
    assert (fake.label, fake.is_paused, fake.is_updating) == ("none", False, False)
    assert "does not have the weights: audit failed" in caplog.text
    await server.connect()
    assert server.state is ServerState.CONNECTED
    await server.close()


@pytest.mark.parametrize("kind", [launched, lambda fakes: attached(fakes, fakes.server())])
@on_loop
async def test_first_update_that_fails_makes_a_server_failed(fakes, kind):
    server = kind(fakes)
    await server.connect()
    await updated(server, failure="audit failed", is_first=True)
    assert server.state is ServerState.FAILED and "audit failed" in server.failure
    await server.close()


@pytest.mark.parametrize("path", ["/pause_generation", "/begin_weight_update"])
@pytest.mark.parametrize("status", [400, 500])
@on_loop
async def test_server_that_does_not_pause_is_lost(fakes, path, status):
    fake = fakes.server()
    server = attached(fakes, fake)
    await server.connect()
    fake.break_(path, "status", status)
    assert not await server.pause_for_update()
    assert server.state is ServerState.LOST and not server.is_busy
    await server.close()


@pytest.mark.parametrize("path", ["/end_weight_update", "/flush_cache", "/continue_generation"])
@on_loop
async def test_server_that_does_not_continue_is_lost(fakes, path):
    fake = fakes.server()
    server = attached(fakes, fake)
    await server.connect()
    fake.break_(path, "drop")
    await updated(server)
    assert server.state is ServerState.LOST and not server.is_busy
    await server.close()


@on_loop
async def test_launched_server_restarts_at_its_port(fakes):
    server = launched(fakes)
    await server.connect()
    fakes.kill(fakes.last(0))
    assert server.is_down and server.is_up
    await server.connect()
    assert server.state is ServerState.CONNECTED and [index for index, _ in fakes.started] == [0, 0]
    assert len({fake.port for _, fake in fakes.started}) == 1
    await server.close()


@on_loop
async def test_launched_server_fails_after_max_restarts_in_a_row(fakes):
    server = launched(fakes)
    for _ in range(3):
        await server.connect()
        assert server.state is ServerState.CONNECTED
        await server.report_lost(ServerLost("gone"))
    assert server.state is ServerState.FAILED and "gone" in server.failure
    assert "rollout.sglang.max_restarts" in server.failure and len(fakes.started) == 3
    await server.connect()
    assert len(fakes.started) == 3
    await server.close()


@on_loop
async def test_launched_server_that_answers_may_restart_again(fakes):
    server = launched(fakes)
    for _ in range(5):
        await server.connect()
        server.report_answer()
        await server.report_lost(ServerLost("gone"))
    await server.connect()
    assert server.state is ServerState.CONNECTED and len(fakes.started) == 6
    await server.close()


@on_loop
async def test_launched_server_that_never_ran_fails_at_once(fakes):
    fakes.prepare = lambda index, fake: setattr(fake, "exit_code", 1)
    server = launched(fakes)
    await server.connect()
    assert server.state is ServerState.FAILED and "ended with exit code 1" in server.failure
    await server.close()


@on_loop
async def test_launched_server_that_ran_before_retries_its_start(fakes):
    server = launched(fakes)
    await server.connect()
    fakes.prepare = lambda index, fake: setattr(fake, "exit_code", 1 if len(fakes.started) == 2 else None)
    fakes.kill(fakes.last(0))
    await server.connect()
    assert server.state is ServerState.CONNECTED and len(fakes.started) == 3
    await server.close()


@on_loop
async def test_start_failure_names_the_end_of_the_log(fakes):
    fakes.prepare = lambda index, fake: setattr(fake, "exit_code", 9)
    server = launched(fakes)
    await server.connect()
    assert "exit code 9" in server.failure and "last line of the log" in server.failure
    await server.close()


@on_loop
async def test_start_error_of_the_launcher_is_the_failure(fakes):
    fakes.start_error = "SGLang is not installed"
    server = launched(fakes)
    await server.connect()
    assert server.failure == "SGLang is not installed"
    await server.close()


@on_loop
async def test_attached_server_lost_twice_without_an_answer_fails(fakes):
    server = attached(fakes, fakes.server())
    await server.connect()
    await server.report_lost(ServerLost("first"))
    assert server.state is ServerState.LOST
    await server.report_lost(ServerLost("the same loss"))
    assert server.state is ServerState.LOST
    await server.connect()
    await server.report_lost(ServerLost("second"))
    assert server.state is ServerState.FAILED and server.failure == "second"
    await server.close()


@on_loop
async def test_loss_reported_during_an_update_that_notices_it_counts_once(fakes):
    server = attached(fakes, fakes.server())
    await server.connect()
    assert await server.pause_for_update()
    reporting = asyncio.create_task(server.report_lost(ServerLost("gone")))
    await asyncio.sleep(0)
    await server.finish_update("1-a", "gone", is_first=False)
    await reporting
    assert server.state is ServerState.LOST
    await server.close()


@on_loop
async def test_attached_server_may_be_lost_again_after_an_answer(fakes):
    server = attached(fakes, fakes.server())
    for _ in range(3):
        await server.connect()
        server.report_answer()
        await server.report_lost(ServerLost("gone"))
    assert server.state is ServerState.LOST
    await server.close()


@on_loop
async def test_silent_server_fails_after_startup_seconds(fakes):
    fake = fakes.server()
    fake.break_("/model_info", "hang")
    server = attached(fakes, fake, startup_seconds=0.1)
    await server.connect()
    assert server.state is ServerState.FAILED and "rollout.sglang.startup_seconds" in server.failure
    await server.close()


@pytest.mark.parametrize(
    ("info", "said"),
    [
        ({"custom_weight_loader": []}, "--custom-weight-loader fake.load"),
        ({"tp_size": 2}, "rollout.sglang.tensor"),
        ({"device": "cuda"}, "rollout.sglang.device"),
        ({"weight_version": "asleep"}, "released its memory"),
        ({"weight_version": "3-another-5e"}, "weights 3-another-5e of another run, which may be live"),
    ],
)
@on_loop
async def test_server_with_other_options_fails(fakes, info, said):
    server = attached(fakes, fakes.server(info=info))
    await server.connect()
    assert server.state is ServerState.FAILED and said in server.failure
    await server.close()


@on_loop
async def test_server_that_fails_the_check_is_failed(fakes):
    def check(url, found):
        raise ValueError("another model")

    server = AttachedServer(0, fakes.server().url, fakes.settings(check=check))
    await server.connect()
    assert server.failure == "another model"
    await server.close()


@on_loop
async def test_stale_attached_server_is_described_again(fakes):
    fake = fakes.server(label="1-a")
    server = attached(fakes, fake)
    await server.connect()
    fake.label = "2-b"
    server.report_stale(ValueError("stale"))
    assert (server.state, server.label) == (ServerState.CONNECTED, None)
    await server.connect()
    assert server.label == "2-b"
    await server.close()


@on_loop
async def test_offload_and_onload_call_in_order(fakes):
    fake = fakes.server()
    server = colocated(fakes, fake)
    await server.connect()
    fake.calls.clear()
    await updated(server)
    assert server.state is ServerState.UPDATED and fake.is_paused
    await server.onload("1-a")
    assert server.state is ServerState.CONNECTED and not fake.is_paused
    await server.offload()
    assert server.state is ServerState.OFFLOADED and fake.released == {"weights", "kv_cache"}
    assert fake.calls == [*UPDATE, *CONTINUE, *OFFLOAD]
    fake.calls.clear()
    await updated(server, "2-a")
    assert fake.calls == ["/resume_memory_occupation weights", *UPDATE[1:]] and fake.released == {"kv_cache"}
    await server.onload("2-a")
    assert fake.calls[3:] == ["/resume_memory_occupation kv_cache", *CONTINUE]
    assert fake.exit_code is None and server.label == "2-a"
    await server.close()


@on_loop
async def test_offload_before_onload_releases_the_weights_alone(fakes):
    fake = fakes.server()
    server = colocated(fakes, fake)
    await server.connect()
    await updated(server)
    await server.offload()
    await updated(server, "2-a")
    fake.calls.clear()
    await server.offload()
    assert fake.calls == ["/update_weight_version asleep", "/release_memory_occupation weights"]
    assert server.state is ServerState.OFFLOADED and fake.exit_code is None
    await server.close()


@on_loop
async def test_update_again_before_onload_is_allowed(fakes):
    server = colocated(fakes, fakes.server())
    await server.connect()
    await updated(server, "1-a")
    await updated(server, "2-a")
    assert (server.state, server.label) == (ServerState.UPDATED, "2-a")
    await server.close()


@pytest.mark.parametrize(("path", "state"), [("/flush_cache", "UPDATED"), ("/pause_generation", "CONNECTED")])
@on_loop
async def test_server_lost_at_onload_or_offload(fakes, path, state):
    fake = fakes.server()
    server = colocated(fakes, fake)
    await server.connect()
    await updated(server)
    if state == "CONNECTED":
        await server.onload("1-a")
    fake.break_(path, "drop")
    await (server.onload("1-a") if state == "UPDATED" else server.offload())
    assert server.state is ServerState.LOST
    await server.close()


@on_loop
async def test_server_lost_while_offloaded_is_lost_at_the_next_update(fakes):
    fake = fakes.server()
    server = colocated(fakes, fake)
    await server.connect()
    await updated(server)
    await server.offload()
    fakes.kill(fake)
    assert not await server.pause_for_update()
    assert server.state is ServerState.LOST
    await server.close()


@on_loop
async def test_onload_of_other_weights_does_nothing(fakes):
    fake = fakes.server()
    server = colocated(fakes, fake)
    await server.connect()
    await updated(server)
    fake.calls.clear()
    await server.onload("2-a")
    assert server.state is ServerState.UPDATED and not fake.calls
    await server.close()


@on_loop
async def test_offload_ends_a_launched_server_that_is_lost(fakes):
    server = launched(fakes, placement="colocated", transport="ipc")
    await server.connect()
    await server.report_lost(ServerLost("gone"))
    await server.offload()
    assert server.state is ServerState.LOST and server.process is None
    await server.close()


@on_loop
async def test_remote_server_asks_for_the_label(fakes):
    fake = fakes.server(label="0-a")
    server = RemoteServer(0, fake.url, fakes.settings())
    await server.connect()
    waiting = asyncio.create_task(server.wait_for_weights(lambda: "1-a", lambda: None))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    fake.label = "1-a"
    assert await asyncio.wait_for(waiting, 2)
    assert (server.state, server.label) == (ServerState.CONNECTED, "1-a")
    server.follow_update("2-a")
    assert (server.state, server.label) == (ServerState.CONNECTED, "2-a") and not fake.calls
    await server.close()


@on_loop
async def test_remote_server_that_failed_gets_another_chance(fakes):
    fake = fakes.server(label="0-a")
    server = RemoteServer(0, fake.url, fakes.settings(startup_seconds=1.0))
    await server.connect()
    assert not await server.wait_for_weights(lambda: "1-a", lambda: None)
    assert server.state is ServerState.FAILED and "rollout.sglang.startup_seconds" in server.failure
    fake.label = "1-a"
    server.follow_update(None)
    assert server.state is ServerState.LOST and server.failure is None
    await server.connect()
    assert await server.wait_for_weights(lambda: "1-a", lambda: None)
    await server.close()


@on_loop
async def test_waiting_for_weights_ends_with_the_server(fakes):
    server = attached(fakes, fakes.server())
    await server.connect()
    polls = []
    waiting = asyncio.create_task(server.wait_for_weights(lambda: "1-a", lambda: polls.append(1)))
    await until(lambda: polls)
    await server.report_lost(ServerLost("gone"))
    assert not await asyncio.wait_for(waiting, 2)
    await server.close()


@pytest.mark.parametrize("seconds", [0.0, 0.005, 0.01, 0.02, 0.05])
@on_loop
async def test_cancelled_connect_ends_whenever_it_is_cancelled(fakes, seconds):
    server = AttachedServer(0, f"http://127.0.0.1:{free_port()}", fakes.settings())
    waiting = asyncio.create_task(server.connect())
    await asyncio.sleep(seconds)
    waiting.cancel()
    _, still = await asyncio.wait([waiting], timeout=2)
    assert not still and waiting.cancelled() and not server.is_busy
    await server.close()


@pytest.mark.parametrize("steps", range(5))
@on_loop
async def test_cancelled_connect_ends_right_after_a_refusal(fakes, monkeypatch, steps):
    """Python 3.11's wait_for loses a cancellation in the same turn of the loop as the answer."""
    server, asked = attached(fakes, fakes.server()), []

    async def describe():
        asked.append(asyncio.get_running_loop().create_future())
        await asked[-1]

    monkeypatch.setattr(server.client, "describe", describe)
    waiting = asyncio.create_task(server.connect())
    while not asked:
        await asyncio.sleep(0)
    asked[0].set_exception(ServerLost("refused"))
    for _ in range(steps):
        await asyncio.sleep(0)
    waiting.cancel()
    _, still = await asyncio.wait([waiting], timeout=2)
    assert not still and waiting.cancelled() and len(asked) == 1
    await server.close()


@on_loop
async def test_state_has_no_transition_back_from_failed(fakes):
    server = attached(fakes, fakes.server(info={"tp_size": 2}))
    await server.connect()
    server.report_stale(ValueError("stale"))
    await server.report_lost(ServerLost("gone"))
    await server.offload()
    assert server.state is ServerState.FAILED
    assert not LaunchedServer.transitions[ServerState.FAILED]
    await server.close()
