"""Servers behind a network that delays every byte, and now and then resets a connection in the middle of an answer."""

from __future__ import annotations

import asyncio

from tests.fake_sglang import FakeSGLang, response
from tests.unit.servers.conftest import generate, on_loop, requests_of, update

DELAY_SECONDS = 0.02
RESET_EVERY = 20


class Proxy:
    """A TCP proxy to a server."""

    def __init__(self, server: FakeSGLang):
        self._server = server
        self._num_answers = self.num_resets = 0
        self.may_reset = False
        self.url = ""

    async def start(self) -> Proxy:
        listener = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        return self

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_reader, to_writer = await asyncio.open_connection("127.0.0.1", self._server.port)
        sending = asyncio.create_task(self._copy(reader, to_writer))
        try:
            await self._copy(to_reader, writer, is_answer=True)
        except (ConnectionError, asyncio.CancelledError):
            pass  # the other end is closed, or the test is over
        finally:
            sending.cancel()
            to_writer.transport.abort()
            writer.transport.abort()

    async def _copy(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, is_answer: bool = False
    ) -> None:
        """Copies bytes with a delay; returns in the middle of an answer that is lost."""
        while data := await reader.read(2**16):
            await asyncio.sleep(DELAY_SECONDS)
            self._num_answers += is_answer and self.may_reset
            if is_answer and self.may_reset and self._num_answers % RESET_EVERY == 0:
                self.num_resets += 1
                writer.write(data[: len(data) // 2])
                return
            writer.write(data)


@on_loop
async def test_delay_and_reset_connections_cost_no_response(fakes):
    """Each request is answered once, with its own tokens; a reset connection is a loss that passes."""
    proxies = [await Proxy(fakes.server()).start() for _ in range(2)]
    pool = fakes.pool(*(proxy.url for proxy in proxies), max_concurrency=4)
    for version in range(4):
        for proxy in proxies:
            proxy.may_reset = False
        await update(pool, version, wait=True)
        for proxy in proxies:
            proxy.may_reset = True
        requests = requests_of(24)
        found = await generate(pool, requests)
        assert [completion.token_ids for completion in found] == [response(r.prompt_ids, 10) for r in requests]
    assert sum(proxy.num_resets for proxy in proxies) > 0 and pool.num_retries > 0
    await pool.close()
