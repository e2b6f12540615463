"""A paused server's requests run on the servers' event loop, and their failures say whether the server is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from oreal_megatron.servers.client import RequestRefused, ServerLost
from oreal_megatron.weight_sync.types import PausedServer, TransferFailure, failure_of_answer


class Client:
    """The part of ServerClient that the tests call."""

    def __init__(self, error: Exception | None = None, url: str = "http://server"):
        self.error = error
        self.url = url
        self.directories: list[Path] = []

    async def update_weights_from_disk(self, directory: Path) -> None:
        if self.error is not None:
            raise self.error
        self.directories.append(directory)

    async def update_weights_from_tensor(self, payloads: Sequence[bytes], load_format: str) -> None:
        if self.error is not None:
            raise self.error


def run(coroutine: Any) -> Future[None]:
    answer: Future[None] = Future()
    try:
        answer.set_result(asyncio.run(coroutine))
    except Exception as error:
        answer.set_exception(error)
    return answer


def test_paused_server_passes_requests_to_its_client():
    client = Client()
    server = PausedServer(client, 0, run)
    assert server.name == client.url
    assert failure_of_answer(server.update_weights_from_disk(Path("version_000001"))) is None
    assert client.directories == [Path("version_000001")]


@pytest.mark.parametrize(("error", "is_lost"), [(ServerLost("gone"), True), (RequestRefused("no room"), False)])
def test_failure_says_whether_a_server_is_lost(error, is_lost):
    server = PausedServer(Client(error), 0, run)
    failure = failure_of_answer(server.update_weights_from_disk(Path()))
    assert failure == TransferFailure(str(error), is_lost=is_lost)
