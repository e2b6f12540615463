"""Requests of the client, and its errors, against a fake SGLang."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

import psutil
import pytest

from oreal_megatron.servers.client import RequestRefused, ServerClient, ServerLost
from tests.fake_sglang import STOP, free_port, response
from tests.unit.servers.conftest import on_loop, until

SAMPLING = {"max_new_tokens": 6}


def client_of(fake, control_seconds=2.0, health_seconds=60.0):
    return ServerClient(fake.url, max_concurrency=4, control_seconds=control_seconds, health_seconds=health_seconds)


@on_loop
async def test_generate_returns_tokens_logprobs_and_labels(fakes):
    client = client_of(fakes.server(label="3-a"))
    generated = await client.generate("r", (5, 6), SAMPLING)
    assert generated.token_ids == response((5, 6), 6)
    assert generated.logprobs == tuple(-token / 100 for token in generated.token_ids)
    assert generated.finish == {"type": "length"} and generated.weight_labels == (("3-a", 6),)
    await client.close()


@on_loop
async def test_no_request_is_sent_on_a_connection_that_was_idle():
    """The server closes a connection as a second request arrives on it, as SGLang does with one idle for 5 seconds."""

    async def answer_once(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        body = b'{"weight_version": "3-a"}'
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        await reader.read(1)
        writer.transport.abort()

    server = await asyncio.start_server(answer_once, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    client = ServerClient(url, max_concurrency=4, control_seconds=2.0, health_seconds=60.0)
    assert [await client.weight_label() for _ in range(3)] == ["3-a"] * 3
    await client.close()
    server.close()


@on_loop
async def test_generate_names_every_label_of_a_response(fakes):
    fake = fakes.server(label="3-a", token_seconds=0.01)
    client = client_of(fake)
    running = asyncio.create_task(client.generate("r", (5, 6), {"max_new_tokens": 30}))
    await asyncio.sleep(0.1)
    fake.label = "4-a"
    (old, end), new = (await running).weight_labels
    assert old == "3-a" and 0 < end < 30 and new == ("4-a", 30)
    await client.close()


@on_loop
async def test_abort_request_returns_the_tokens_so_far(fakes):
    fake = fakes.server(token_seconds=0.01)
    client = client_of(fake)
    running = asyncio.create_task(client.generate("r", (5, 6), {"max_new_tokens": 1000}))
    await until(lambda: fake.prompts)
    await asyncio.sleep(0.05)
    await client.abort_request("r")
    generated = await asyncio.wait_for(running, 2)
    assert generated.finish["type"] == "abort" and len(generated.token_ids) < 1000
    assert generated.token_ids == response((5, 6), len(generated.token_ids))
    await client.close()


@pytest.mark.parametrize(("how", "value"), [("drop", 0), ("part", 0), ("status", 500), ("status", 503)])
@on_loop
async def test_generate_without_a_whole_answer_is_a_loss(fakes, how, value):
    fake = fakes.server()
    fake.break_("/generate", how, value)
    client = client_of(fake)
    with pytest.raises(ServerLost, match="/generate"):
        await client.generate("r", (5, 6), SAMPLING)
    await client.close()


@on_loop
async def test_generate_that_is_refused_is_no_loss(fakes):
    fake = fakes.server()
    fake.break_("/generate", "status", 400)
    client = client_of(fake)
    with pytest.raises(RequestRefused, match="400"):
        await client.generate("r", (5, 6), SAMPLING)
    await client.close()


@on_loop
async def test_control_request_that_hangs_is_a_loss(fakes):
    fake = fakes.server()
    fake.break_("/pause_generation", "hang")
    client = client_of(fake, control_seconds=0.1)
    with pytest.raises(ServerLost, match="/pause_generation"):
        await client.pause_generation()
    await client.close()


@on_loop
async def test_generate_has_no_time_limit(fakes):
    fake = fakes.server()
    fake.break_("/generate", "delay", 0.3)
    client = client_of(fake, control_seconds=0.05)
    assert (await client.generate("r", (5, 6), SAMPLING)).token_ids == response((5, 6), 6)
    await client.close()


@on_loop
async def test_health_is_false_where_nothing_listens(fakes):
    client = ServerClient(
        f"http://127.0.0.1:{free_port()}", max_concurrency=1, control_seconds=1.0, health_seconds=60.0
    )
    assert not await client.is_healthy(0.2)
    await client.close()


@on_loop
async def test_health_is_false_when_it_is_late(fakes):
    fake = fakes.server()
    client = client_of(fake)
    assert await client.is_healthy(1.0)
    fake.break_("/health", "delay", 0.3)
    assert not await client.is_healthy(0.05)
    await client.close()


@on_loop
async def test_describe_reads_both_endpoints(fakes):
    fake = fakes.server(label="x", info={"tp_size": 4, "enable_memory_saver": True})
    client = client_of(fake)
    found = await client.describe()
    assert (found.weight_label, found.tensor, found.saves_memory) == ("x", 4, True)
    assert found.weight_loaders == ("fake.load",) and await client.weight_label() == "x"
    await client.close()


@on_loop
async def test_freeze_gc_may_be_refused(fakes):
    fake = fakes.server()
    fake.break_("/freeze_gc", "status", 404)
    client = client_of(fake)
    await client.freeze_gc()
    await client.close()


@on_loop
async def test_weight_updates_call_their_endpoints(fakes):
    fake = fakes.server()
    client = client_of(fake)
    await client.pause_generation()
    await client.begin_weight_update()
    await client.init_weights_update_group({"group_name": "g"})
    await client.update_weights_from_distributed({"names": []})
    await client.destroy_weights_update_group("g")
    await client.update_weights_from_tensor([b"payload"], "direct")
    await client.update_weights_from_disk(Path("version_1"))
    await client.end_weight_update()
    assert fake.calls == [
        "/pause_generation",
        "/begin_weight_update",
        "/init_weights_update_group",
        "/update_weights_from_distributed",
        "/destroy_weights_update_group",
        "/update_weights_from_tensor",
        "/update_weights_from_disk",
        "/end_weight_update",
    ]
    # SGLang would call the weight loader for a draft model too, which has other parameters.
    for_target = ("/begin_weight_update", "/update_weights_from_distributed", "/update_weights_from_tensor")
    assert fake.selectors == dict.fromkeys(for_target, "target")
    with pytest.raises(RequestRefused):
        await client.update_weights_from_disk(Path("version_1"))
    await client.close()


@on_loop
async def test_response_that_stops_keeps_the_stop_token(fakes):
    client = client_of(fakes.server(stop_after=3))
    generated = await client.generate("r", (5, 6), SAMPLING)
    assert generated.token_ids == (*response((5, 6), 3), STOP) and generated.finish["matched"] == STOP
    await client.close()


@pytest.mark.parametrize(("health_seconds", "probe_seconds"), [(60.0, 5), (8.0, 2), (0.5, 1)])
@on_loop
async def test_connection_of_a_request_without_time_limit_is_probed(fakes, health_seconds, probe_seconds):
    """TCP closes it if the server's host does not know it any more. tests/hosts does that to a connection."""
    fake = fakes.server(token_seconds=0.01)
    client = client_of(fake, health_seconds=health_seconds)
    running = asyncio.create_task(client.generate("r", (5, 6), {"max_new_tokens": 1000}))
    await until(lambda: fake.prompts)
    (number,) = [c.fd for c in psutil.Process().net_connections("tcp") if c.raddr and c.raddr.port == fake.port]
    with socket.socket(fileno=os.dup(number)) as connection:
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL):
            assert connection.getsockopt(socket.IPPROTO_TCP, option) == probe_seconds
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 1000 * health_seconds
    running.cancel()
    await client.close()
