"""A request to a server whose host forgets the connection, or does not answer any more."""

from __future__ import annotations

import asyncio

import pytest

from oreal_megatron.servers.client import ServerClient, ServerLost
from oreal_megatron.servers.server_process import server_url
from tests.fake_sglang import FakeSGLang
from tests.ranks import FORK

pytestmark = pytest.mark.hosts

PORT = 4000


def serve(host, address):
    host.enter()

    async def forever():
        await FakeSGLang(host=address, port=PORT, token_seconds=1.0).start()
        await asyncio.Event().wait()

    asyncio.run(forever())


@pytest.mark.parametrize(("comes_back", "health_seconds"), [(True, 60.0), (False, 4.0)])
def test_a_connection_without_another_end_is_lost(network, nodeb, comes_back, health_seconds):
    """The server's host loses its connections: at once when it is reachable again, else after the time of silence."""
    FORK.Process(target=serve, args=(nodeb, nodeb.address), daemon=True).start()

    async def lose():
        client = ServerClient(
            f"http://{nodeb.address}:{PORT}", max_concurrency=2, control_seconds=5.0, health_seconds=health_seconds
        )
        while not await client.is_healthy(1.0):
            await asyncio.sleep(0.1)
        waiting = asyncio.create_task(client.generate("r", (5, 6), {"max_new_tokens": 1000}))
        await asyncio.sleep(1.0)
        assert not waiting.done()
        nodeb.cut()
        nodeb.forget_connections()
        if comes_back:
            network.restore(nodeb)
            assert await client.is_healthy(5.0), "the server itself is alive"
        with pytest.raises(ServerLost, match="ReadError"):
            # Without these signs of life it waits for ever.
            await asyncio.wait_for(waiting, 45)
        await client.close()

    asyncio.run(lose())


def test_request_that_begins_while_the_link_is_cut_waits_for_it(network, nodeb):
    """Every request opens a connection, so a cut that is shorter than health_seconds must not lose the server."""
    FORK.Process(target=serve, args=(nodeb, nodeb.address), daemon=True).start()

    async def ask():
        url = server_url(nodeb.address, PORT)
        client = ServerClient(url, max_concurrency=2, control_seconds=60.0, health_seconds=60.0)
        while not await client.is_healthy(1.0):
            await asyncio.sleep(0.1)
        nodeb.cut()
        asked = [
            asyncio.create_task(client.describe()),
            asyncio.create_task(client.generate("r", (5, 6), {"max_new_tokens": 1})),
        ]
        await asyncio.sleep(12.0)
        network.restore(nodeb)
        _, answer = await asyncio.gather(*asked)
        assert answer.token_ids
        await client.close()

    asyncio.run(ask())


def test_server_at_an_ipv6_address_is_reached_until_its_link_is_cut(nodeb):
    """A host that does not answer is unhealthy after the time that was asked for, not after that of a connection."""
    FORK.Process(target=serve, args=(nodeb, nodeb.address6), daemon=True).start()

    async def ask():
        url = server_url(nodeb.address6, PORT)
        client = ServerClient(url, max_concurrency=2, control_seconds=5.0, health_seconds=60.0)
        while not await client.is_healthy(1.0):
            await asyncio.sleep(0.1)
        assert (await client.generate("r", (5, 6), {"max_new_tokens": 2})).token_ids
        await client.close()
        nodeb.cut()
        client = ServerClient(url, max_concurrency=2, control_seconds=5.0, health_seconds=60.0)
        assert not await asyncio.wait_for(client.is_healthy(0.5), 8)
        await client.close()

    asyncio.run(ask())
