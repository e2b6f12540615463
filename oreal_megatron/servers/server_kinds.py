"""The three kinds of servers: launched by this run, attached to, and remote (another process of the run's)."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from typing import ClassVar

from oreal_megatron.servers.client import RequestRefused, ServerLost
from oreal_megatron.servers.server import ServerSettings, ServerState, SGLangServer
from oreal_megatron.servers.server_process import NO_WEIGHTS, ServerProcess, ServerStartError, run_of_label


class LaunchedServer(SGLangServer):
    """A server that this run starts when it first connects, restarts when it is lost, and ends."""

    def __init__(self, index: int, url: str, settings: ServerSettings):
        super().__init__(index, url, settings)
        self._process: ServerProcess | None = None

    @property
    def process(self) -> ServerProcess | None:
        """The child process; None before it starts and after it has been ended."""
        return self._process

    @property
    def is_down(self) -> bool:
        return not self.is_up or (self._process is not None and self._process.exit_code is not None)

    async def _connect(self) -> None:
        if self._process is not None and self._process.exit_code is not None:
            raise ServerLost(f"{self.url} ended with exit code {self._process.exit_code}")
        if self.is_up:
            return
        if self._process is None:
            self._process = self._settings.launcher.start(self.index, int(self.url.rsplit(":", 1)[1]))
        await self._describe()
        while not await self.client.is_healthy(self._config.health_seconds):
            self._check_alive()
            await asyncio.sleep(self._settings.poll_seconds)
        self._set_state(ServerState.CONNECTED)

    async def _mark_lost(self, error: Exception) -> None:
        """Ends the process, so that `connect` starts another; the server fails after too many restarts in a row."""
        self._count_loss(error)
        await self._end()
        if self._num_losses > self._config.max_restarts:
            self._mark_failed(f"{error}; restarted {self._config.max_restarts} times (rollout.sglang.max_restarts)")

    async def _end(self) -> None:
        if self._process is not None:
            await asyncio.to_thread(self._process.stop)
            self._process = None

    def _check_alive(self) -> None:
        if self._process is not None and (code := self._process.exit_code) is not None:
            raise ServerStartError(f"{self.url} ended with exit code {code} while it started{self.end_of_log()}")

    def end_of_log(self) -> str:
        return f"; {self._process.log} ends:\n{self._process.log_tail()}" if self._process else ""


class AttachedServer(SGLangServer):
    """A server that ran before this run and goes on after it; it serves one run at a time, which its label names."""

    async def _connect(self) -> None:
        if not self.is_up or self._label is None:
            self._set_state(ServerState.CONNECTED, label=(await self._describe()).weight_label)

    async def _end(self) -> None:
        if self._label is not None and run_of_label(self._label) == self._settings.run:
            with contextlib.suppress(ServerLost, RequestRefused):
                await self.client.update_weight_version(NO_WEIGHTS)  # free for another run

    async def _abandon_update(self) -> None:
        if not self._config.shares_devices:
            with contextlib.suppress(ServerLost, RequestRefused):
                await self.client.end_weight_update()
                await self._continue(NO_WEIGHTS)


class RemoteServer(SGLangServer):
    """A server that another process of this run starts and updates; this process only sends requests to it."""

    transitions: ClassVar[Mapping[ServerState, frozenset[ServerState]]] = {
        **SGLangServer.transitions,
        ServerState.NEW: SGLangServer.transitions[ServerState.NEW] | {ServerState.LOST},
        ServerState.FAILED: frozenset({ServerState.CONNECTED, ServerState.LOST}),
    }

    async def _connect(self) -> None:
        if not self.is_up:
            self._set_state(ServerState.CONNECTED, label=(await self._wait_for_description()).weight_label)

    def follow_update(self, label: str | None) -> None:
        """Records what the other process knows of the server after an update.

        label: of the weights that the server has been given; None: the server is lost to the other process, which may
        start it again. Earlier losses and failures are forgotten.
        """
        if label is not None:
            self._num_losses = 0
            self._set_state(ServerState.CONNECTED, label=label)
        elif self._state is not ServerState.LOST:
            self._num_losses = 1
            self._set_state(ServerState.LOST, reason=f"{self.url} has not been given the current weights")

    async def wait_for_weights(self, label: Callable[[], str], waiting: Callable[[], None]) -> bool:
        """Returns True once the server says that it has the weights that `label` names, False if it is lost or failed.

        The server fails if that takes longer than rollout.sglang.startup_seconds. `waiting` is not called.
        """
        clock = asyncio.get_running_loop().time
        deadline = clock() + self._config.startup_seconds
        while self.is_up:
            if self._label == label():
                return True
            if clock() > deadline:
                self._mark_failed(
                    f"{self.url} did not get the current weights in time (rollout.sglang.startup_seconds)"
                )
                return False
            await asyncio.sleep(self._settings.poll_seconds / 5)
            try:
                self._set_state(ServerState.CONNECTED, label=await self.client.weight_label())
            except ServerLost as error:
                await self.report_lost(error)
        return False
