"""An SGLang server as the run sees it: its state, the transitions between states, and the calls that make them.

`connect`, `pause_for_update`, `finish_update`, `onload`, `offload`, `report_lost` and `report_stale` change the state;
ServerPool and Router call these methods and read the rest.
"""

from __future__ import annotations

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar

from oreal_megatron.config import SGLangConfig
from oreal_megatron.servers.client import (
    KV_CACHE,
    WEIGHTS,
    RequestRefused,
    ServerClient,
    ServerDescription,
    ServerLost,
)
from oreal_megatron.servers.fingerprint import check_options
from oreal_megatron.servers.server_process import OFFLOADED, Launcher, ServerStartError
from oreal_megatron.timeline import Timeline

logger = logging.getLogger(__name__)


class ServerState(Enum):
    """State of a server, as far as this process knows. The values are used in log lines."""

    NEW = "not connected"
    """The server has never answered."""
    CONNECTED = "connected"
    """The server answers and generates. Its label says with which weights; it is None if they are unknown."""
    UPDATING = "updating"
    """The server is paused and takes weights; the caller of `pause_for_update` holds its lock."""
    UPDATED = "updated"
    """The server has new weights and stays paused until `onload`, because it shares the trainer's devices."""
    OFFLOADED = "offloaded"
    """The server is paused and has released its weights and KV cache to the trainer."""
    LOST = "lost"
    """Contact was lost; `connect` restarts a launched server, and waits for any other."""
    FAILED = "failed"
    """The server gets no more requests."""


_NEW = ServerState.NEW
_CONNECTED = ServerState.CONNECTED
_UPDATING = ServerState.UPDATING
_UPDATED = ServerState.UPDATED
_OFFLOADED = ServerState.OFFLOADED
_LOST = ServerState.LOST
_FAILED = ServerState.FAILED
_IS_UP = frozenset({_CONNECTED, _UPDATING, _UPDATED, _OFFLOADED})
_LOG_LEVELS = {_LOST: logging.WARNING, _FAILED: logging.ERROR}


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Settings and checks shared by all servers of a pool."""

    config: SGLangConfig
    launcher: Launcher
    check: Callable[[str, ServerDescription], None]
    """Check of a server's URL and description; raises ValueError if the server does not fit the run."""
    run: str
    """Id of the run, which stays over its restarts; a part of the weights' labels."""
    poll_seconds: float = 0.5
    """Seconds between two attempts to reach a server."""
    keep_cache: bool = False
    """Whether responses under way keep their KV cache over an update."""
    timeline: Timeline = field(default_factory=Timeline)
    """Recorder of requests and states; that of the run, or one that records nothing."""


class SGLangServer(ABC):
    """Base of launched, attached and remote servers. Use a server on one event loop."""

    transitions: ClassVar[Mapping[ServerState, frozenset[ServerState]]] = {
        _NEW: frozenset({_NEW, _CONNECTED, _FAILED}),
        _CONNECTED: frozenset({_CONNECTED, _UPDATING, _OFFLOADED, _LOST, _FAILED}),
        _UPDATING: frozenset({_CONNECTED, _UPDATED, _LOST, _FAILED}),
        _UPDATED: frozenset({_CONNECTED, _UPDATING, _OFFLOADED, _LOST, _FAILED}),
        _OFFLOADED: frozenset({_UPDATING, _LOST, _FAILED}),
        _LOST: frozenset({_CONNECTED, _LOST, _FAILED}),
        _FAILED: frozenset(),
    }

    def __init__(self, index: int, url: str, settings: ServerSettings):
        """index: position among all servers of the run."""
        config = settings.config
        self.index = index
        self.client = ServerClient(
            url,
            max_concurrency=config.max_concurrency,
            control_seconds=config.control_seconds,
            health_seconds=config.health_seconds,
        )
        self._settings = settings
        self._config = config
        self._state = _NEW
        self._label: str | None = None
        self._reason: str | None = None
        self._released_tags: frozenset[str] = frozenset()
        # Held while the server is started, updated, onloaded or offloaded.
        self._lock = asyncio.Lock()
        # Losses of contact since the server last answered a request.
        self._num_losses = 0

    @property
    def state(self) -> ServerState:
        return self._state

    @property
    def url(self) -> str:
        return self.client.url

    @property
    def label(self) -> str | None:
        """Weight label last confirmed on the server; None if unknown."""
        return self._label

    @property
    def failure(self) -> str | None:
        """Reason why the server failed; None unless it has."""
        return self._reason if self._state is _FAILED else None

    @property
    def is_up(self) -> bool:
        """Whether the server has answered, as a server of this model, since contact was last lost."""
        return self._state in _IS_UP

    @property
    def is_down(self) -> bool:
        """Whether `connect` has to reach or to start the server."""
        return not self.is_up

    @property
    def is_busy(self) -> bool:
        """Whether the server is being started, updated, onloaded or offloaded."""
        return self._lock.locked()

    def _set_state(self, state: ServerState, *, label: str | None = None, reason: str | None = None) -> None:
        if state not in self.transitions[self._state]:
            raise AssertionError(f"rollout server {self.index} cannot go from {self._state} to {state}")
        self._state, self._label, self._reason = state, label, reason
        detail = reason or (f"weights {label}" if label is not None else "")
        self._settings.timeline.state(self.index, self.url, state.value, detail)
        level = _LOG_LEVELS.get(state, logging.DEBUG if reason is None else logging.WARNING)
        logger.log(level, "rollout server %d %s: %s", self.index, state.value, reason or f"weights {label}")

    async def connect(self) -> None:
        """Waits until the server is up, starting it if necessary, or has failed."""
        async with self._lock:
            while self._state is not _FAILED:
                try:
                    await self._connect()
                    return
                except ServerLost as error:
                    await self._mark_lost(error)
                except ServerStartError as error:
                    # A server that ran before can start again; a server that never ran probably cannot.
                    if self._state is _NEW:
                        self._mark_failed(str(error))
                    else:
                        await self._mark_lost(error)
                except ValueError as error:
                    self._mark_failed(str(error))

    @abstractmethod
    async def _connect(self) -> None:
        """Makes the state CONNECTED, unless the server is up.

        Raises:
            ServerLost: The server does not answer in time.
            ServerStartError: The server cannot start.
            ValueError: The server does not fit the run.
        """

    async def report_lost(self, error: Exception) -> None:
        """Records that a request has lost contact. Does nothing if the loss has been noticed already."""
        if self.is_up:
            async with self._lock:
                if self.is_up:
                    await self._mark_lost(error)

    def report_stale(self, error: Exception) -> None:
        """Records that the server has answered with other weights: which weights it has is unknown."""
        if self._state is _CONNECTED:
            self._set_state(_CONNECTED, reason=str(error))

    def report_answer(self) -> None:
        """Resets the count of losses after a successful request."""
        self._num_losses = 0

    async def wait_for_weights(self, label: Callable[[], str], waiting: Callable[[], None]) -> bool:
        """Returns True once the server has the weights with the label that `label` returns, False once it is lost.

        label: may return another label after an update. waiting: called at every poll until then.
        """
        while self.is_up:
            if self._label == label():
                return True
            waiting()
            await asyncio.sleep(self._settings.poll_seconds / 5)
        return False

    async def _mark_lost(self, error: Exception) -> None:
        """Records a loss of contact; the server fails if contact is lost twice without an answer in between.

        The caller holds the lock.
        """
        self._count_loss(error)
        if self._num_losses > 1:
            self._mark_failed(str(error))

    def _count_loss(self, error: Exception) -> None:
        self._set_state(_NEW if self._state is _NEW else _LOST, reason=str(error))
        self._released_tags = frozenset()
        self._num_losses += 1

    def _mark_failed(self, reason: str) -> None:
        self._set_state(_FAILED, reason=reason)

    async def close(self) -> None:
        """Ends a launched server, and closes the connections to any other."""
        await self._end()
        await self.client.close()

    async def _end(self) -> None:  # noqa: B027
        """Ends the server's process, if this run has launched it."""

    async def pause_for_update(self) -> bool:
        """Pauses the server and opens it for new weights; returns whether it takes them.

        On True the caller holds the server's lock until it calls `finish_update`.
        """
        await self._lock.acquire()
        is_paused = False
        try:
            if not self.is_up:  # lost while the caller waited for the lock
                return False
            start = time.perf_counter()
            if WEIGHTS in self._released_tags:
                await self.client.resume_memory_occupation([WEIGHTS])
                self._released_tags -= {WEIGHTS}
            else:
                await self.client.pause_generation(keep_cache=self._settings.keep_cache)
            await self.client.begin_weight_update()
            self._settings.timeline.pause(self.index, start)
            self._set_state(_UPDATING)
            is_paused = True
        except (ServerLost, RequestRefused) as error:
            await self._mark_lost(error)
        finally:
            if not is_paused:
                self._lock.release()
        return is_paused

    async def finish_update(self, label: str, failure: str | None, *, is_first: bool) -> None:
        """Ends an update and lets the server generate, or leaves it to `onload` if it shares the trainer's devices.

        failure: why the server does not have weights `label`, or None; the server counts as lost then, and fails if
        these are its first weights.
        """
        try:
            if failure is not None:
                raise ServerLost(f"{self.url} does not have the weights: {failure}")
            await self.client.end_weight_update()
            if self._config.shares_devices:
                self._set_state(_UPDATED, label=label)
            else:
                await self._continue(label)
                self._set_state(_CONNECTED, label=label)
        except (ServerLost, RequestRefused) as error:
            await self._abandon_update()
            if is_first:
                self._mark_failed(str(error))
            else:
                await self._mark_lost(error)
        finally:
            self._lock.release()

    async def _abandon_update(self) -> None:  # noqa: B027
        """Leaves the server usable for others after a failed update, where others may use it."""

    async def _continue(self, label: str) -> None:
        """Resumes a paused server, with all memory that it has released, under weight label `label`."""
        if self._released_tags:
            await self.client.resume_memory_occupation(sorted(self._released_tags))
            self._released_tags = frozenset()
        if not self._settings.keep_cache:  # SGLang refuses it while responses hold a cache
            await self.client.flush_cache()
        await self.client.update_weight_version(label)
        await self.client.continue_generation()

    async def onload(self, label: str) -> None:
        """Lets an updated server take KV memory and generate. Does nothing if the server does not have `label`."""
        async with self._lock:
            if self._label != label:
                return
            try:
                await self._continue(label)
                self._set_state(_CONNECTED, label=label)
            except (ServerLost, RequestRefused) as error:
                await self._mark_lost(error)

    async def offload(self) -> None:
        """Has the server release its weights and KV cache; ends a launched server that is not up.

        A server that is starting is waited for, because how much memory it takes is unknown until it runs.
        """
        async with self._lock:
            if not self.is_up:
                await self._end()
                return
            try:
                if not self._released_tags:
                    await self.client.pause_generation()
                # Labelled before its memory is released: a run that attaches to the server sees that it has no weights.
                await self.client.update_weight_version(OFFLOADED)
                await self.client.release_memory_occupation(sorted({WEIGHTS, KV_CACHE} - self._released_tags))
                self._released_tags = frozenset({WEIGHTS, KV_CACHE})
                self._set_state(_OFFLOADED, label=OFFLOADED)
            except (ServerLost, RequestRefused) as error:
                await self._mark_lost(error)

    async def _describe(self) -> ServerDescription:
        """Returns the server's description once it answers and fits the run, and calls gc.freeze() on it."""
        found = await self._wait_for_description()
        self._settings.check(self.url, found)
        check_options(self.url, found, self._config, self._settings.launcher.weight_loader, self._settings.run)
        # On a CPU a flush collects garbage, which takes half a second without this.
        await self.client.freeze_gc()
        return found

    async def _wait_for_description(self) -> ServerDescription:
        """Returns the server's description once it answers; a paused server answers too."""
        clock, limit = asyncio.get_running_loop().time, self._config.startup_seconds
        deadline = clock() + limit
        while True:
            self._check_alive()
            try:
                # Python 3.11's wait_for loses a cancellation that arrives together with the answer.
                async with asyncio.timeout(max(deadline - clock(), self._settings.poll_seconds)):
                    return await self.client.describe()
            except (ServerLost, TimeoutError) as error:
                if clock() > deadline:
                    raise ServerLost(
                        f"{self.url} gave no answer in {limit:g} seconds "
                        f"(rollout.sglang.startup_seconds){self.end_of_log()}"
                    ) from error
            await asyncio.sleep(self._settings.poll_seconds)

    def _check_alive(self) -> None:  # noqa: B027
        """Raises ServerStartError if the server's process, launched by this run, has ended."""

    def end_of_log(self) -> str:
        """Returns the last lines of a launched server's log, for error messages."""
        return ""
