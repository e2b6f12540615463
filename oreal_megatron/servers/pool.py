"""Several SGLang servers as one: they are opened for new weights, settled with them, and asked; nobody has old ones.

All of it runs on one event loop, in one thread of the trainer's main process.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from oreal_megatron.config import SamplingConfig
from oreal_megatron.files import write_atomically
from oreal_megatron.servers.client import KV_CACHE, WEIGHTS, RequestRefused, ServerLost
from oreal_megatron.servers.request_queue import RequestQueue
from oreal_megatron.servers.router import Router, WeightVersion, no_server
from oreal_megatron.servers.server import POLL_SECONDS, ServerSettings, SGLangServer
from oreal_megatron.servers.server_process import NO_WEIGHTS, OFFLOADED, choose_port, offloaded_mark
from oreal_megatron.types import Completion, GenerationRequest


class ServerPool:
    """The servers, launched or attached to."""

    def __init__(self, settings: ServerSettings, *, stop_token_id: int, config_json: Mapping[str, Any]):
        """config_json: of the model, for what servers start from."""
        self._settings = settings
        self._config = settings.config
        self._stop_token_id = stop_token_id
        self._config_json = config_json
        self._token = uuid.uuid4().hex[:8]
        self._weights: WeightVersion | None = None
        self._reconnecting: list[asyncio.Task[None]] = []
        self._is_first = True
        self._is_offloaded = False
        self._has_reported_no_weights = False
        self.on_no_current_weights: Callable[[], None] = lambda: None
        """The owner's: called once until the next `settle`, where no server has the weights and one waits for them."""
        self.servers: list[SGLangServer] = []
        self.num_retries = 0
        """Responses that were asked for again, over the fleet's life."""

    def label(self, version: int) -> str:
        """What the servers call a weight version. No other run calls its own so."""
        return f"{version}-{self._token}"

    # ---- weights -------------------------------------------------------------------------------------------------

    async def open(self, weights: WeightVersion, *, wait: bool) -> list[SGLangServer]:
        """The servers that are to get `weights`, paused. Until `settle` they are nobody else's.

        wait: for servers that are starting, too; of the first weights, always, and where servers share the trainer's
        devices, which are theirs now alone. Otherwise these get the weights later.

        Raises:
            NoServerError: no server can be used; or, of the first weights, one server cannot.
        """
        self._weights = weights
        if not self.servers:
            self._start()
        if self._config.shares_devices:
            self._mark_offloaded(False)
        if wait or self._is_first or self._config.shares_devices:
            await asyncio.gather(*(server.connect() for server in self.servers))
        self._check_usable()
        chosen = [m for m in self.servers if m.is_up and m.label != weights.label and not m.lock.locked()]
        await asyncio.gather(*(self._pause(server) for server in chosen))
        return [server for server in chosen if server.is_up]

    def _start(self) -> None:
        model = self._settings.launcher.model
        model.mkdir(parents=True, exist_ok=True)
        write_atomically(model / "config.json", json.dumps(self._config_json, indent=2) + "\n")
        if self._config.urls:
            self.servers = [SGLangServer(i, url, "attached", self._settings) for i, url in enumerate(self._config.urls)]
        else:
            ports = [choose_port(self._config, number) for number in range(self._config.num_servers)]
            self.servers = [
                SGLangServer(i, f"http://{self._config.host}:{port}", "launched", self._settings)
                for i, port in enumerate(ports)
            ]
        self._reconnecting = [asyncio.create_task(self._reconnect_lost(server)) for server in self.servers]

    async def _reconnect_lost(self, server: SGLangServer) -> None:
        """Has a lost server back, started anew if it is ours, whether or not anybody waits for it: in time for the next
        weights.
        """
        while server.failed is None:
            await asyncio.sleep(POLL_SECONDS)
            # While they rest, the devices are the trainer's.
            if server.is_down and not self._is_offloaded and not server.lock.locked():
                await server.connect()

    async def _pause(self, server: SGLangServer) -> None:
        await server.lock.acquire()
        try:
            if WEIGHTS in server.released_tags:
                await server.client.resume_memory_occupation([WEIGHTS])
                server.released_tags -= {WEIGHTS}
            else:
                await server.client.pause_generation()
            await server.client.begin_weight_update()
        except (ServerLost, RequestRefused) as error:
            await server.mark_lost(error)
            server.lock.release()

    async def finish_update(self, opened: Sequence[SGLangServer], failures: Mapping[str, str]) -> None:
        """Servers that have the weights go on; those that failed (by URL, with the reason) are lost.

        Servers that share the trainer's devices go on with `wake`.

        Raises:
            NoServerError: as `open`.
        """
        await asyncio.gather(*(self._finish_update(server, failures.get(server.client.url)) for server in opened))
        self._has_reported_no_weights = False
        self._check_usable()
        self._is_first = False

    async def _finish_update(self, server: SGLangServer, failure: str | None) -> None:
        assert self._weights is not None
        try:
            if failure is not None:
                raise ServerLost(f"{server.client.url} does not have the weights: {failure}")
            await server.client.end_weight_update()
            if not self._config.shares_devices:
                await self._continue(server, self._weights.label)
            server.label = self._weights.label
        except (ServerLost, RequestRefused) as error:
            if not (server.is_launched or self._config.shares_devices):
                # It may be somebody else's too: it goes on, with weights that nobody asks for.
                with contextlib.suppress(ServerLost, RequestRefused):
                    await server.client.end_weight_update()
                    await self._continue(server, NO_WEIGHTS)
            if self._is_first:
                server.mark_failed(str(error))
            else:
                await server.mark_lost(error)
        finally:
            server.lock.release()

    async def _continue(self, server: SGLangServer, label: str) -> None:
        """From a paused server to one that answers; what it has released comes back."""
        if server.released_tags:
            await server.client.resume_memory_occupation(sorted(server.released_tags))
            server.released_tags = frozenset()
        await server.client.flush_cache()
        await server.client.update_weight_version(label)
        await server.client.continue_generation()

    def _check_usable(self) -> None:
        """Raises NoServerError where no server is left; or, before any had weights, where one cannot be used."""
        failed = [server for server in self.servers if server.failed is not None]
        if failed and (self._is_first or len(failed) == len(self.servers)):
            raise no_server(self.servers, failed)

    async def follow(self, version: int, label: str, urls: Sequence[str]) -> None:
        """For a fleet of another process: its servers are to be used while they have weights `label`."""
        self._weights = WeightVersion(version=version, label=label)
        if not self.servers:
            self.servers = [SGLangServer(index, url, "followed", self._settings) for index, url in enumerate(urls)]
        for server in self.servers:
            # The label is that of the weights before these: the server says what it has.
            server.forget()

    # ---- devices in turns with the trainer -----------------------------------------------------------------------

    async def onload(self) -> None:
        """Servers that hold the current weights and share the trainer's devices take what they need to generate.

        Raises:
            NoServerError: no server can be used.
        """
        assert self._weights is not None
        label = self._weights.label
        await asyncio.gather(*(self._onload(server, label) for server in self.servers if server.label == label))
        self._check_usable()

    async def _onload(self, server: SGLangServer, label: str) -> None:
        async with server.lock:
            try:
                await self._continue(server, label)
            except (ServerLost, RequestRefused) as error:
                await server.mark_lost(error)

    async def offload(self) -> None:
        """Servers that share the trainer's devices give weights and KV memory back; `open` has them take both again.

        A server that is starting is waited for: until then nobody knows what it takes.

        Raises:
            NoServerError: no server is left.
        """
        self._mark_offloaded(True)
        await asyncio.gather(*(self._offload(server) for server in self.servers))
        self._check_usable()

    async def _offload(self, server: SGLangServer) -> None:
        async with server.lock:
            if not server.is_up:
                await server.end()
                return
            try:
                if not server.released_tags:
                    await server.client.pause_generation()
                # Said first: whoever finds the server so knows that it has no weights.
                await server.client.update_weight_version(OFFLOADED)
                server.label = OFFLOADED
                await server.client.release_memory_occupation(sorted({WEIGHTS, KV_CACHE} - server.released_tags))
                server.released_tags = frozenset({WEIGHTS, KV_CACHE})
            except (ServerLost, RequestRefused) as error:
                await server.mark_lost(error)

    def _mark_offloaded(self, is_offloaded: bool) -> None:
        """Tells whoever else starts servers (slurm/node_servers.py) whether they may."""
        self._is_offloaded = is_offloaded
        mark = offloaded_mark(self._settings.launcher.model)
        if is_offloaded:
            mark.touch()
        else:
            mark.unlink(missing_ok=True)

    # ---- generation ----------------------------------------------------------------------------------------------

    async def generate(
        self,
        requests: Sequence[GenerationRequest],
        sampling: SamplingConfig,
        completed: Callable[[int, Completion], None],
        is_enough: Callable[[], bool] | None = None,
    ) -> None:
        """One completion a request, what is generated now with the current weights; `completed` is told each once.

        is_enough: once it is true the servers are told to break off, and completions are what there is.

        Raises:
            NoServerError: no server is left, or a request loses one after the other.
            ValueError: the servers refuse a request.
        """
        assert self._weights is not None
        router = Router(
            RequestQueue(requests, sampling, completed),
            self.servers,
            self._weights,
            self._config,
            token=self._token,
            stop_token_id=self._stop_token_id,
            no_current_weights=self._no_current_weights,
        )
        try:
            await router.finish(is_enough)
        finally:
            self.num_retries += router.num_retries

    def _no_current_weights(self) -> None:
        if not self._has_reported_no_weights:
            self._has_reported_no_weights = True
            self.on_no_current_weights()

    async def close(self) -> None:
        """Ends launched servers; those that were running before us go on."""
        for supervisor in self._reconnecting:
            supervisor.cancel()
        await asyncio.gather(*(server.end() for server in self.servers))
        await asyncio.gather(*(server.client.close() for server in self.servers))
