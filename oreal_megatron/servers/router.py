"""Dealing requests out to servers that have the current weights, until every one is answered once.

A server is kept full while it answers; what it was working on when it is lost goes to the others, or waits for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from oreal_megatron.config import SGLangConfig
from oreal_megatron.servers.client import Generated, RequestRefused, ServerLost
from oreal_megatron.servers.request_queue import LostTooOftenError, RequestQueue
from oreal_megatron.servers.server import POLL_SECONDS, SGLangServer
from oreal_megatron.types import Completion

logger = logging.getLogger(__name__)

# Between two looks at whether a step has enough, and between two aborts of what is under way still.
_ENOUGH_SECONDS = 0.1


class NoServerError(RuntimeError):
    """No server is left that could answer; the message says why of each."""


def no_server(servers: Sequence[SGLangServer], failed: Sequence[SGLangServer]) -> NoServerError:
    reasons = "\n".join(f"  {server.client.url}: {server.failed}" for server in failed)
    return NoServerError(f"{len(failed)} of {len(servers)} rollout servers cannot be used:\n{reasons}")


@dataclass(frozen=True, kw_only=True)
class WeightVersion:
    """What servers must have before they get a prompt."""

    version: int
    label: str
    """What servers call them: unlike any other run's."""


class Router:
    """One call's work, on its way to the members of a fleet and back."""

    def __init__(
        self,
        queue: RequestQueue,
        servers: Sequence[SGLangServer],
        weights: WeightVersion,
        config: SGLangConfig,
        *,
        token: str,
        stop_token_id: int,
        no_current_weights: Callable[[], None],
    ):
        """token: begins request ids, unlike any other run's. no_current_weights: called repeatedly while a server
        waits for weights that no server has.
        """
        self._queue = queue
        self._servers = servers
        self._weights = weights
        self._config = config
        self._token = token
        self._stop_token_id = stop_token_id
        self._no_current_weights = no_current_weights
        self.num_retries = 0
        """Responses that were asked for again."""

    async def finish(self, is_enough: Callable[[], bool] | None) -> None:
        """See Fleet.generate."""
        queue = self._queue
        if queue.finished.is_set():
            return
        serving = [asyncio.create_task(self._serve(server)) for server in self._servers]
        waiting = asyncio.create_task(queue.finished.wait())
        ending = asyncio.create_task(self._end_early(is_enough))
        try:
            while not queue.finished.is_set():
                await asyncio.wait([waiting, *serving], return_when=asyncio.FIRST_COMPLETED)
                ended = [server for server in serving if server.done()]
                for server in ended:
                    _raise_failure(server)
                serving = [task for task in serving if not task.done()]
                if not serving and not queue.finished.is_set():
                    raise no_server(self._servers, self._servers)
        finally:
            for task in (waiting, ending, *serving):
                task.cancel()
            await asyncio.gather(waiting, ending, *serving, return_exceptions=True)

    async def _end_early(self, is_enough: Callable[[], bool] | None) -> None:
        """Ends the work once there is enough."""
        if is_enough is None:
            return
        while not is_enough():
            await asyncio.sleep(_ENOUGH_SECONDS)
        self._queue.end()
        while self._queue.at_servers:  # an abort that overtakes its request has no effect
            aborts = [client.abort_request(rid) for rid, client in self._queue.at_servers.items()]
            await asyncio.gather(*aborts, return_exceptions=True)  # lost servers are noticed elsewhere
            await asyncio.sleep(_ENOUGH_SECONDS)

    async def _serve(self, server: SGLangServer) -> None:
        """Keeps one server full until the work is finished or the server is given up."""
        while True:
            await self._bring_up(server)
            if server.failed is not None:
                return
            try:
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(self._watch(server))
                    for _ in range(min(self._config.max_concurrency, len(self._queue.requests))):
                        tasks.create_task(self._ask(server))
            except* ServerLost as group:
                await server.lost(_first(group))
            except* _Stale as group:
                server.label = None
                logger.warning("rollout server %d: %s", server.index, _first(group))

    async def _bring_up(self, server: SGLangServer) -> None:
        """Until the member has the current weights, or is given up."""
        while server.failed is None:
            await server.connect()
            if await self._has_weights(server):
                return

    async def _has_weights(self, server: SGLangServer) -> bool:
        """Waits until a publication has reached the member; false if it is lost meanwhile."""
        clock, label, is_followed = asyncio.get_running_loop().time, self._weights.label, server.kind == "followed"
        deadline = clock() + self._config.startup_seconds
        while server.failed is None and (server.is_up or is_followed):
            if is_followed and server.label is None:
                with contextlib.suppress(ServerLost):
                    server.label = await server.client.weight_label()
            if server.label == label:
                return True
            if is_followed and clock() > deadline:
                server.mark_failed(f"{server.client.url} did not get the current weights in time")
            if is_followed:
                server.label = None  # to be asked for again
            elif all(other.label != label for other in self._servers):
                self._no_current_weights()
            await asyncio.sleep(POLL_SECONDS / 5)
        return False

    async def _ask(self, server: SGLangServer) -> None:
        """One request after another."""
        queue = self._queue
        while True:
            index = await queue.pending.get()
            rid = f"{self._token}-{uuid.uuid4().hex[:12]}"
            queue.at_servers[rid] = server.client
            try:
                generated = await server.client.generate(
                    rid, queue.input_ids(index), queue.options(index, self._stop_token_id)
                )
                completion = self._completed(server, index, generated)
            except (ServerLost, _Stale, asyncio.CancelledError) as error:
                if not queue.finished.is_set():
                    lost = error if isinstance(error, Exception) else ServerLost(server.client.url)
                    self._put_back(index, lost)
                raise
            finally:
                del queue.at_servers[rid]
            if completion.finish_reason is None and not queue.is_ending:
                self._put_back(index, ServerLost(f"{server.client.url}: somebody else aborted {rid}"))
                continue
            server.restarts.reset()
            queue.complete(index, completion)

    def _put_back(self, index: int, error: Exception) -> None:
        self.num_retries += 1
        try:
            self._queue.put_back(index, error)
        except LostTooOftenError as often:
            raise NoServerError(str(often)) from error

    def _completed(self, server: SGLangServer, index: int, generated: Generated) -> Completion:
        if generated.token_ids and generated.weight_labels != {self._weights.label}:
            raise _Stale(
                f"answered with weights {', '.join(sorted(generated.weight_labels))}, not {self._weights.label}; "
                "its answers are thrown away and it is brought up to date"
            )
        if generated.finish["type"] == "stop" and generated.token_ids[-1:] != (self._stop_token_id,):
            raise RequestRefused(
                f"{server.client.url} ended a response at {generated.finish.get('matched')!r}, which is not "
                f"prompt.stop_token (id {self._stop_token_id}); start the server with --skip-tokenizer-init, from a "
                "config.json and generation_config.json without other end tokens"
            )
        version, stop = self._weights.version, self._stop_token_id
        return self._queue.completion(index, generated, version=version, stop_token_id=stop)

    async def _watch(self, server: SGLangServer) -> None:
        """Raises ServerLost where a server that accepts requests does not answer any more."""
        silence, clock = self._config.health_seconds, asyncio.get_running_loop().time
        last_sign = clock()
        while True:
            await asyncio.sleep(silence / 4)
            if await server.client.is_healthy(max(silence - (clock() - last_sign), POLL_SECONDS)):
                last_sign = clock()
            elif clock() - last_sign >= silence:
                raise ServerLost(f"{server.client.url} gave no sign of life in {silence:g} seconds")


class _Stale(Exception):
    """A server answered with other weights than the current ones."""


def _raise_failure(task: asyncio.Task[None]) -> None:
    """The error of an ended task, without the groups around it."""
    try:
        task.result()
    except BaseExceptionGroup as group:
        raise _first(group) from group


def _first(group: BaseExceptionGroup[Any]) -> Exception:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
