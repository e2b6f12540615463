"""Routes requests to servers that have the current weights, until every request is answered once.

Every server is kept at its full concurrency. Requests of a server that is lost go to the other servers, or wait for it.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from oreal_megatron.servers.client import Generated, RequestRefused, ServerLost
from oreal_megatron.servers.request_queue import NoServerError, RequestQueue
from oreal_megatron.servers.server import ServerSettings, ServerState, SGLangServer
from oreal_megatron.types import Completion

# Seconds between two calls of `is_enough`, and between two rounds of aborts afterwards.
_ENOUGH_SECONDS = 0.1


class Router:
    """Sends the requests of one queue to servers and returns their answers to it."""

    def __init__(
        self,
        queue: RequestQueue,
        servers: Sequence[SGLangServer],
        settings: ServerSettings,
        *,
        version: int,
        label: str,
        token: str,
        stop_token_id: int,
        no_current_weights: Callable[[], None],
    ):
        """Binds a queue to servers.

        version, label: weights that a server must have to get requests. token: prefix of request ids, unique to the
        run. no_current_weights: called repeatedly while a server waits for weights that no server has.
        """
        self._queue = queue
        self._servers = servers
        self._settings = settings
        self._version = version
        self._label = label
        self._token = token
        self._stop_token_id = stop_token_id
        self._no_current_weights = no_current_weights
        self.num_retries = 0
        """Responses that were requested again."""

    async def finish(self, is_enough: Callable[[], bool] | None) -> None:
        """Returns once every request has its completion; see ServerPool.generate."""
        queue = self._queue
        if queue.finished.is_set():
            return
        serving: list[asyncio.Task[None]] = [asyncio.create_task(self._serve(server)) for server in self._servers]
        waiting: asyncio.Task[Any] = asyncio.create_task(queue.finished.wait())
        ending = asyncio.create_task(self._end_early(is_enough))
        try:
            while not queue.finished.is_set():
                await asyncio.wait([waiting, *serving], return_when=asyncio.FIRST_COMPLETED)
                for task in serving:
                    if task.done():
                        _raise_failure(task)
                serving = [task for task in serving if not task.done()]
                if not serving and not queue.finished.is_set():
                    raise NoServerError.of({s.url: s.failure for s in self._servers}, len(self._servers))
        finally:
            for task in (waiting, ending, *serving):
                task.cancel()
            await asyncio.gather(waiting, ending, *serving, return_exceptions=True)

    async def _end_early(self, is_enough: Callable[[], bool] | None) -> None:
        """Aborts the remaining requests once `is_enough` returns True."""
        if is_enough is None:
            return
        while not is_enough():
            await asyncio.sleep(_ENOUGH_SECONDS)
        self._queue.end()
        while self._queue.at_servers:  # an abort that overtakes its request has no effect
            aborts = [client.abort_request(rid) for rid, client in self._queue.at_servers.items()]
            await asyncio.gather(*aborts, return_exceptions=True)  # `_watch` notices lost servers
            await asyncio.sleep(_ENOUGH_SECONDS)

    async def _serve(self, server: SGLangServer) -> None:
        """Keeps a server at its full concurrency until it has failed; cancelled once the queue is finished."""
        while True:
            await self._wait_until_ready(server)
            if server.state is ServerState.FAILED:
                return
            try:
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(self._watch(server))
                    for _ in range(min(self._settings.config.max_concurrency, len(self._queue.requests))):
                        tasks.create_task(self._send_requests(server))
            except* ServerLost as group:
                await server.report_lost(_first(group))
            except* _StaleAnswer as group:
                server.report_stale(_first(group))

    async def _wait_until_ready(self, server: SGLangServer) -> None:
        """Returns once the server has the current weights or has failed."""

        def waiting() -> None:
            if all(other.label != self._label for other in self._servers):
                self._no_current_weights()

        while server.state is not ServerState.FAILED:
            await server.connect()
            if await server.wait_for_weights(self._label, waiting):
                return

    async def _send_requests(self, server: SGLangServer) -> None:
        """Sends pending requests to the server, one after another."""
        queue = self._queue
        while True:
            index = await queue.pending.get()
            rid = f"{self._token}-{uuid.uuid4().hex[:12]}"
            queue.at_servers[rid] = server.client
            try:
                generated = await server.client.generate(
                    rid, queue.input_ids(index), queue.options(index, self._stop_token_id)
                )
                completion = self._completion(server, index, generated)
            except (ServerLost, _StaleAnswer, asyncio.CancelledError) as error:
                if not queue.finished.is_set():
                    self._put_back(index, error if isinstance(error, Exception) else ServerLost(server.url))
                raise
            finally:
                del queue.at_servers[rid]
            if completion.finish_reason is None and not queue.is_ending:
                self._put_back(index, ServerLost(f"{server.url}: another client aborted {rid}"))
                continue
            server.report_answer()
            queue.complete(index, completion)

    def _put_back(self, index: int, error: Exception) -> None:
        self.num_retries += 1
        self._queue.put_back(index, error)

    def _completion(self, server: SGLangServer, index: int, generated: Generated) -> Completion:
        if generated.token_ids and generated.weight_labels != {self._label}:
            raise _StaleAnswer(
                f"answered with weights {', '.join(sorted(generated.weight_labels))}, not {self._label}; "
                "its answers are discarded, and it waits for the current weights"
            )
        if generated.finish["type"] == "stop" and generated.token_ids[-1:] != (self._stop_token_id,):
            raise RequestRefused(
                f"{server.url} ended a response at {generated.finish.get('matched')!r}, which is not "
                f"prompt.stop_token (id {self._stop_token_id}); start the server with --skip-tokenizer-init, from a "
                "config.json and generation_config.json without other end tokens"
            )
        return self._queue.completion(index, generated, version=self._version, stop_token_id=self._stop_token_id)

    async def _watch(self, server: SGLangServer) -> None:
        """Raises ServerLost if the server answers no health check for rollout.sglang.health_seconds."""
        silence, clock = self._settings.config.health_seconds, asyncio.get_running_loop().time
        last_answer = clock()
        while True:
            await asyncio.sleep(silence / 4)
            if await server.client.is_healthy(max(silence - (clock() - last_answer), self._settings.poll_seconds)):
                last_answer = clock()
            elif clock() - last_answer >= silence:
                raise ServerLost(f"{server.url} answered no health check in {silence:g} seconds")


class _StaleAnswer(Exception):
    """A server answered with other weights than the current weights."""


def _raise_failure(task: asyncio.Task[None]) -> None:
    """Raises the error of an ended task, without the exception groups around it."""
    try:
        task.result()
    except BaseExceptionGroup as group:
        raise _first(group) from group


def _first(group: BaseExceptionGroup[Any]) -> Exception:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
