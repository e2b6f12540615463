"""One server of a fleet, from its start to its end: launched by us, attached to, or another process's to look after."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from oreal_megatron.config import SGLangConfig
from oreal_megatron.servers.client import ServerClient, ServerDescription, ServerLost
from oreal_megatron.servers.server_process import OFFLOADED, Launcher, Restarts, ServerProcess, ServerStartError

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """What every server of a fleet is started from, and held to."""

    config: SGLangConfig
    launcher: Launcher
    check: Callable[[str, ServerDescription], None]
    """Told url and description; raises ValueError where a server is not what the run needs."""


class SGLangServer:
    """One server; use it on one event loop."""

    def __init__(
        self, index: int, url: str, kind: Literal["launched", "attached", "followed"], settings: ServerSettings
    ):
        """kind: launched by us, when it is first reached; running before us; or looked after by another process."""
        self.index = index
        self.kind = kind
        self.client = ServerClient(
            url, max_concurrency=settings.config.max_concurrency, control_seconds=settings.config.control_seconds
        )
        self.process: ServerProcess | None = None
        """Of a launched one that runs."""
        self.label: str | None = None
        """Of the weights that it was seen to have since contact was last lost; None: not seen yet."""
        self.is_up = False
        """Whether it has answered, as our model's, since contact was last lost."""
        self.released_tags: frozenset[str] = frozenset()
        """What of its memory it has given back; see ServerClient.release_memory."""
        self.failed: str | None = None
        """Why it gets no more requests, or None."""
        self.lock = asyncio.Lock()
        """Held by who starts it, publishes to it or changes what it has of the devices."""
        self.restarts = Restarts(settings.config.max_restarts)
        """Since it last answered a request."""
        self._was_up = False
        self._settings = settings

    @property
    def is_launched(self) -> bool:
        return self.kind == "launched"

    @property
    def is_down(self) -> bool:
        """Not reached yet, lost, or a launched one that has ended since."""
        return not self.is_up or (self.process is not None and self.process.exit_code is not None)

    def forget(self) -> None:
        """For a followed one whose weights have changed: what it has, and whether it can be used, is to be seen."""
        self.failed, self.label = None, None
        self.restarts.reset()

    async def connect(self) -> None:
        """Until it answers, or is given up."""
        async with self.lock:
            while self.failed is None:
                try:
                    await self._connect()
                    self.is_up = self._was_up = True
                    return
                except ServerLost as error:
                    await self.mark_lost(error)
                except ServerStartError as error:
                    if self._was_up:
                        await self.mark_lost(error)
                    else:
                        self.mark_failed(str(error))
                except ValueError as error:
                    self.mark_failed(str(error))

    async def _connect(self) -> None:
        """Starts it if it is ours and not running; waits until it answers.

        Raises:
            ServerLost: it does not, in time. ServerStartError: it cannot start. ValueError: it is another model's.
        """
        if self.kind == "followed":
            return
        if self.process is not None and self.process.exit_code is not None:
            raise ServerLost(f"{self.client.url} ended with exit code {self.process.exit_code}")
        if self.is_up and (self.is_launched or self.label is not None):
            return
        if self.is_launched and self.process is None:
            self.process = self._settings.launcher.start(self.index, int(self.client.url.rsplit(":", 1)[1]))
        found = await self._described()
        # On a CPU a flush collects garbage: half a second of it otherwise.
        await self.client.freeze_gc()
        if not self.is_launched:
            self.label = found.weight_label
            return
        while not await self.client.is_healthy(self._settings.config.health_seconds):
            self._check_alive()
            await asyncio.sleep(POLL_SECONDS)

    async def _described(self) -> ServerDescription:
        """What the server says of itself, when it does.

        Raises:
            ValueError: it is not what the run needs.
        """
        url, found, config = self.client.url, await self._until_it_answers(), self._settings.config
        self._settings.check(url, found)
        loader = self._settings.launcher.weight_loader
        if loader not in found.weight_loaders:
            raise ValueError(
                f"{url} was started without --custom-weight-loader {loader}, by which it would take and "
                "audit weights; start it with that option and this package on its PYTHONPATH"
            )
        for key, has, wanted in (("tensor", found.tensor, config.tensor), ("device", found.device, config.device)):
            if has != wanted:
                raise ValueError(f"{url} has {key} {has}, rollout.sglang.{key} is {wanted}: they must be the same")
        if config.shares_devices and config.device == "cuda" and not found.saves_memory:
            raise ValueError(
                f"{url} was started without --enable-memory-saver, and could not give memory back to a trainer on its "
                "devices (rollout.sglang.placement=colocated)"
            )
        if found.weight_label == OFFLOADED:
            raise ValueError(f"{url} has given its memory back to a run that did not wake it any more: start it anew")
        return found

    async def _until_it_answers(self) -> ServerDescription:
        """What the server says of itself; paused ones answer too."""
        clock, most = asyncio.get_running_loop().time, self._settings.config.startup_seconds
        deadline = clock() + most
        while True:
            self._check_alive()
            try:
                # Python 3.11's wait_for loses a cancellation that comes together with the answer.
                async with asyncio.timeout(max(deadline - clock(), POLL_SECONDS)):
                    return await self.client.describe()
            except (ServerLost, TimeoutError) as error:
                if clock() > deadline:
                    raise ServerLost(
                        f"{self.client.url} gave no answer in {most:g} seconds "
                        f"(rollout.sglang.startup_seconds){self._end_of_log()}"
                    ) from error
            await asyncio.sleep(POLL_SECONDS)

    def _check_alive(self) -> None:
        if self.process is not None and (code := self.process.exit_code) is not None:
            raise ServerStartError(
                f"{self.client.url} ended with exit code {code} while it started{self._end_of_log()}"
            )

    def _end_of_log(self) -> str:
        return f"; {self.process.log} ends:\n{self.process.log_tail()}" if self.process else ""

    async def lost(self, error: Exception) -> None:
        """Whoever works with it has lost contact; nothing happens where somebody else has noticed before."""
        if self.is_up:
            async with self.lock:
                await self.mark_lost(error)

    async def mark_lost(self, error: Exception) -> None:
        """Ends what is left of a launched one, so that it is started anew; gives up what cannot be had back.

        For who holds the lock.
        """
        self.label, self.is_up, self.released_tags = None, False, frozenset()
        logger.warning("rollout server %d lost: %s", self.index, error)
        if self.is_launched:
            await self.end()
            if not self.restarts.another():
                most = self._settings.config.max_restarts
                self.mark_failed(f"{error}; restarted {most} times (rollout.sglang.max_restarts)")
        elif self.restarts.in_a_row:
            # Contact was lost again before it answered anything: `_reach` has waited as long as it may.
            self.mark_failed(str(error))
        else:
            self.restarts.another()

    def mark_failed(self, why: str) -> None:
        self.failed, self.label, self.is_up = why, None, False
        logger.error("rollout server %d failed: %s", self.index, why)

    async def end(self) -> None:
        """Ends a launched one, and what it has started."""
        if self.process is not None:
            await asyncio.to_thread(self.process.stop)
            self.process = None
