"""A pool of SGLang servers: pauses and resumes them for weight updates, and sends them requests.

Only servers with the current weights get requests. The pool runs on one event loop, in one thread of the trainer's
main process.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from oreal_megatron.config import SamplingConfig
from oreal_megatron.files import write_atomically
from oreal_megatron.servers.request_queue import NoServerError, RequestQueue
from oreal_megatron.servers.router import Router
from oreal_megatron.servers.server import ServerSettings, ServerState, SGLangServer
from oreal_megatron.servers.server_kinds import AttachedServer, LaunchedServer, RemoteServer
from oreal_megatron.servers.server_process import choose_port, offloaded_mark, server_url, weight_label
from oreal_megatron.types import Completion, GenerationRequest


class ServerPool:
    """Servers of a run that share one version of the policy's weights."""

    def __init__(
        self,
        settings: ServerSettings,
        *,
        stop_token_id: int,
        config_json: Mapping[str, Any],
        replica: int = 0,
        num_replicas: int = 1,
        num_generations: int = 1,
        members: range | None = None,
    ):
        """Makes a pool without servers, which the first update creates.

        config_json: the model's config.json, which launched servers start from. replica, num_replicas: number of this
        process's model replica, and of all replicas, which send requests to the same servers. num_generations: most
        calls of `generate` at the same time, which share max_concurrency. members: positions of the pool's servers
        among those of rollout.sglang; None: all of them.
        """
        self.servers: Sequence[SGLangServer] = ()
        self.on_no_current_weights: Callable[[], None] = lambda: None
        """Callback of the owner: a server waits for weights that no server has. Called once until the next update."""
        self._settings = settings
        self._config = settings.config
        self._stop_token_id = stop_token_id
        self.config_json = config_json
        self._replica, self._num_routers = replica, num_replicas * num_generations
        self._members = range(settings.config.total_servers) if members is None else members
        self._token = uuid.uuid4().hex[:8]
        self._version = 0
        self._label: str | None = None
        self._reconnecting: list[asyncio.Task[None]] = []
        self._is_first_update = True
        self._is_offloaded = False
        self._has_reported_no_weights = False
        self._routers: set[Router] = set()
        """Routers of generations that are under way."""
        self._num_earlier_retries = 0

    def label(self, version: int) -> str:
        """Returns the servers' label of weight version `version`, which is unique to this start of the run."""
        return weight_label(version, self._settings.run, self._token)

    @property
    def has_weights(self) -> dict[str, bool]:
        """Whether a server has the weights of the last update, by URL of every server."""
        return {server.url: server.label == self._label for server in self.servers}

    @property
    def num_retries(self) -> int:
        """Responses that were requested again, over the life of the pool."""
        return self._num_earlier_retries + sum(router.num_retries for router in tuple(self._routers))

    # ---- weights -------------------------------------------------------------------------------------------------

    async def connect(self, version: int, *, wait: bool) -> None:
        """Waits for the servers that are to take weights `version`. It may be cancelled.

        wait: whether to wait for servers that are starting. The first update waits always, and so does every update of
        servers that share the trainer's devices. Otherwise a starting server gets its weights at a later update.

        Raises:
            NoServerError: No server is left; at the first update, a server cannot be used.
        """
        self._version, self._label = version, self.label(version)
        if not self.servers:
            self._create_servers()
        if self._config.shares_devices:
            self._mark_offloaded(False)
        if wait or self._is_first_update or self._config.shares_devices:
            await asyncio.gather(*(server.connect() for server in self.servers))
        self._check_usable()

    async def announce(self, version: int, label: str) -> None:
        """Lets requests stay at servers that pause, until `resume` or `follow`; called in every process."""
        for router in self._routers:
            router.begin_update(version, label)

    async def resume(self, label: str) -> None:
        """Lets generation under way go on at the servers that have weights `label`."""
        for router in self._routers:
            router.end_update(label)

    async def begin_update(self) -> list[SGLangServer]:
        """Returns the servers that take the weights, paused; the caller holds their locks until `finish_update`."""
        chosen = [s for s in self.servers if s.is_up and s.label != self._label and not s.is_busy]
        are_paused = await asyncio.gather(*(server.pause_for_update() for server in chosen))
        return [server for server, is_paused in zip(chosen, are_paused, strict=True) if is_paused]

    async def finish_update(self, servers: Sequence[SGLangServer], failures: Mapping[str, str]) -> None:
        """Resumes servers that have the weights; those in `failures` (reason by URL) count as lost.

        Servers that share the trainer's devices stay paused until `onload`.

        Raises:
            NoServerError: No server is left; at the first update, a server does not have the weights.
        """
        label = self._label
        assert label is not None
        await asyncio.gather(
            *(s.finish_update(label, failures.get(s.url), is_first=self._is_first_update) for s in servers)
        )
        self._has_reported_no_weights = False
        self._check_usable()
        # A server that is sent the first weights a second time has not had its first update yet.
        self._is_first_update &= any(server.state is ServerState.UPDATING for server in self.servers)

    async def follow(self, version: int, label: str, has_weights: Mapping[str, bool]) -> None:
        """Makes this pool use servers that another process of the run has updated to weights `label`.

        has_weights: whether a server has these weights, by URL of every server.
        """
        self._version, self._label = version, label
        remote = [server for server in self.servers if isinstance(server, RemoteServer)] or [
            RemoteServer(index, url, self._settings) for index, url in enumerate(has_weights, self._members.start)
        ]
        self.servers = remote
        self._has_reported_no_weights = False
        for server in remote:
            server.follow_update(label if has_weights[server.url] else None)
        await self.resume(label)

    def _create_servers(self) -> None:
        model = self._settings.launcher.model
        model.mkdir(parents=True, exist_ok=True)
        write_atomically(model / "config.json", json.dumps(self.config_json, indent=2) + "\n")
        if self._config.urls:
            self.servers = [AttachedServer(i, self._config.urls[i], self._settings) for i in self._members]
        else:
            ports = {i: choose_port(self._config, i) for i in self._members}
            urls = {i: server_url(self._config.host, port) for i, port in ports.items()}
            self.servers = [LaunchedServer(i, url, self._settings) for i, url in urls.items()]
        self._reconnecting = [asyncio.create_task(self._keep_connected(server)) for server in self.servers]

    async def _keep_connected(self, server: SGLangServer) -> None:
        """Reconnects to a lost server before it is needed, so that it is up for the next update."""
        while server.state is not ServerState.FAILED:
            await asyncio.sleep(self._settings.poll_seconds)
            # The devices of offloaded servers belong to the trainer.
            if server.is_down and not self._is_offloaded and not server.is_busy:
                await server.connect()

    def _check_usable(self) -> None:
        """Raises NoServerError if no server is left; at the first update, if a server cannot be used."""
        failed = [server for server in self.servers if server.state is ServerState.FAILED]
        if failed and (self._is_first_update or len(failed) == len(self.servers)):
            raise NoServerError.of({server.url: server.failure for server in failed}, len(self.servers))

    # ---- devices shared with the trainer -------------------------------------------------------------------------

    async def onload(self) -> None:
        """Lets servers with the current weights, which share the trainer's devices, take KV memory and generate.

        Raises:
            NoServerError: No server is left.
        """
        label = self._label
        assert label is not None
        await asyncio.gather(*(server.onload(label) for server in self.servers if server.label == label))
        self._check_usable()

    async def offload(self) -> None:
        """Has servers that share the trainer's devices release weights and KV cache, until `begin_update`.

        Raises:
            NoServerError: No server is left.
        """
        self._mark_offloaded(True)
        await asyncio.gather(*(server.offload() for server in self.servers))
        self._check_usable()

    def _mark_offloaded(self, is_offloaded: bool) -> None:
        """Tells slurm/node_servers.py, through a file, whether servers may be started now."""
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
        more: Callable[[], Awaitable[Sequence[GenerationRequest]]] | None = None,
    ) -> None:
        """Generates one completion a request with the current weights; calls `completed` with index and completion.

        is_enough: once it returns True, servers abort the remaining requests, and their completions are partial. more:
        awaits further requests, whose indices follow; generation then ends by `is_enough` only.

        Raises:
            NoServerError: No server is left, or a request keeps losing its servers.
            ValueError: A server refuses a request.
        """
        assert self._label is not None
        router = Router(
            RequestQueue(requests, sampling, completed, is_open=more is not None),
            self.servers,
            self._settings,
            version=self._version,
            label=self._label,
            token=self._token,
            stop_token_id=self._stop_token_id,
            replica=self._replica,
            num_replicas=self._num_routers,
            no_current_weights=self._no_current_weights,
        )
        self._routers.add(router)
        try:
            await router.finish(is_enough, more)
        finally:
            self._routers.discard(router)
            self._num_earlier_retries += router.num_retries

    def _no_current_weights(self) -> None:
        if not self._has_reported_no_weights:
            self._has_reported_no_weights = True
            self.on_no_current_weights()

    async def close(self) -> None:
        """Ends launched servers; attached servers go on."""
        for task in self._reconnecting:
            task.cancel()
        await asyncio.gather(*self._reconnecting, return_exceptions=True)
        await asyncio.gather(*(server.close() for server in self.servers))
