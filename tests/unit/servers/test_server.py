"""A server that is waited for, by somebody who is told to stop."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from oreal_megatron.servers.client import ServerLost
from oreal_megatron.servers.server import ServerSettings
from oreal_megatron.servers.server_kinds import AttachedServer
from tests.tiny_servers import servers_config


@pytest.mark.parametrize("steps", range(5))
def test_who_waits_for_a_server_that_does_not_answer_can_always_be_stopped(steps):
    """Also in the moment in which the server has refused. `steps`: of the event loop, from the refusal on."""

    async def stopped() -> None:
        asked = []
        launcher = SimpleNamespace(weight_loader="loader")
        settings = ServerSettings(config=servers_config(), launcher=launcher, check=lambda url, found: None)
        server = AttachedServer(0, "http://127.0.0.1:1", settings)

        async def describe() -> None:
            asked.append(asyncio.get_running_loop().create_future())
            await asked[-1]

        server.client.describe = describe
        waiting = asyncio.create_task(server.connect())
        while not asked:
            await asyncio.sleep(0)
        asked[0].set_exception(ServerLost("refused"))
        for _ in range(steps):
            await asyncio.sleep(0)
        waiting.cancel()
        _, still = await asyncio.wait([waiting], timeout=2)
        assert not still and waiting.cancelled() and len(asked) == 1
        await server.client.close()

    asyncio.run(stopped())
