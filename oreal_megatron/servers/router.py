"""Routes requests to servers that have the current weights, until every request is answered once.

Requests may be under way while the servers are updated: the servers pause, and go on with the new weights.
`begin_update` and `end_update` tell a router of it.

Requests are placed in the order of the queue, in which callers put responses that they expect to be long first. A
request goes to the server with the fewest tokens under way. The samples of a prompt go to one server, whose prefix
cache then holds the prompt, unless other servers would have less than their share, or responses that are expected to
be longer wait. Requests of a server that is lost go to the other servers, or wait for it, before all that no server
had: they were asked for earlier.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Sequence
from math import ceil
from typing import Any

from oreal_megatron.servers.client import Generated, RequestRefused, ServerLost
from oreal_megatron.servers.request_queue import NoServerError, RequestQueue
from oreal_megatron.servers.server import ServerSettings, ServerState, SGLangServer
from oreal_megatron.types import Completion, GenerationRequest

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
        replica: int,
        num_replicas: int,
        no_current_weights: Callable[[], None],
    ):
        """Binds a queue to servers.

        version, label: weights that a server must have to get requests. token: prefix of request ids, unique to the
        run. replica, num_replicas: number of this model replica, and of all replicas, each of which has a router of its
        own for the same servers and about as many requests. no_current_weights: called repeatedly while a server waits
        for weights that no server has.
        """
        self._queue = queue
        self._servers = servers
        self._settings = settings
        self._label = label
        self._versions = {label: version}
        """Versions of weights that may have generated a response, by label."""
        self._is_updating = False
        self._num_updates = 0
        self._token = token
        self._stop_token_id = stop_token_id
        self._no_current_weights = no_current_weights
        # Replicas begin at different servers, or their first requests would all go to the same ones.
        first = replica * len(servers) // num_replicas
        self._order = [*servers[first:], *servers[:first]]
        # This replica's share of the limit, and at least one.
        share = settings.config.max_concurrency + num_replicas - 1 - replica
        self._max_at_server = max(share // num_replicas, 1)
        self._num_replicas = num_replicas
        self._may_place = False
        self._inboxes: dict[SGLangServer, asyncio.Queue[int]] = {}
        """Requests on their way to the servers that take requests now."""
        self._at_server: dict[SGLangServer, dict[int, float]] = {server: {} for server in servers}
        """Requests in the inbox of a server, or sent to it, with the tokens that each was expected to take."""
        self._tokens_under_way = dict.fromkeys(servers, 0.0)
        """Sums of these tokens."""
        self._prompts_of: dict[SGLangServer | None, dict[tuple[int, ...], int]]
        """Pending prompts by the server that has read them, each with the number of samples that it gets yet; by None
        those that no server has."""
        self._prompts_of = {None: dict.fromkeys(queue.pending, 0), **{server: {} for server in servers}}
        self._returned: list[tuple[int, ...]] = []
        """Pending prompts of requests that came back from a server, which are placed before those of `_prompts_of`."""
        self.num_retries = 0
        """Responses that were requested again."""

    async def finish(
        self,
        is_enough: Callable[[], bool] | None,
        more: Callable[[], Awaitable[Sequence[GenerationRequest]]] | None = None,
    ) -> None:
        """Returns once every request has its completion; see ServerPool.generate."""
        queue = self._queue
        if queue.finished.is_set():
            return
        serving: list[asyncio.Task[None]] = [asyncio.create_task(self._serve(server)) for server in self._servers]
        waiting: asyncio.Task[Any] = asyncio.create_task(queue.finished.wait())
        ending = [asyncio.create_task(self._end_early(is_enough))] if is_enough is not None else []
        if more is not None:
            ending.append(asyncio.create_task(self._add(more)))
        try:
            # The tasks of all servers that have the current weights take requests once they have run; the first of them
            # would get everything if requests were placed before. No other server is waited for.
            await asyncio.sleep(0)
            self._may_place = True
            self._place()
            while not queue.finished.is_set():
                await asyncio.wait([waiting, *ending, *serving], return_when=asyncio.FIRST_COMPLETED)
                for task in (*ending, *serving):
                    if task.done():
                        _raise_failure(task)
                ending = [task for task in ending if not task.done()]
                serving = [task for task in serving if not task.done()]
                if not serving and not queue.finished.is_set():
                    raise NoServerError.of({s.url: s.failure for s in self._servers}, len(self._servers))
        finally:
            for task in (waiting, *ending, *serving):
                task.cancel()
            await asyncio.gather(waiting, *ending, *serving, return_exceptions=True)

    def begin_update(self, version: int, label: str) -> None:
        """Keeps requests at their servers while these pause for weights `version`."""
        self._versions[label] = version
        self._is_updating = True
        self._num_updates += 1

    def end_update(self, label: str) -> None:
        """Lets servers that have weights `label` go on; others lose their requests."""
        self._label = label
        self._is_updating = False

    async def _add(self, more: Callable[[], Awaitable[Sequence[GenerationRequest]]]) -> None:
        """Adds the requests that come from `more`, until it is cancelled."""
        queue = self._queue
        while True:
            requests = await more()
            queue.add(requests)
            for request in requests:
                self._note_new(request.prompt_ids)
            self._place()

    async def _end_early(self, is_enough: Callable[[], bool]) -> None:
        """Aborts the remaining requests once `is_enough` returns True, which may ask another process and wait."""
        while not await asyncio.to_thread(is_enough):
            await asyncio.sleep(_ENOUGH_SECONDS)
        self._queue.end()
        while self._queue.at_servers:  # an abort that overtakes its request has no effect
            aborts = [client.abort_request(rid) for rid, client in self._queue.at_servers.items()]
            await asyncio.gather(*aborts, return_exceptions=True)  # `_watch` notices lost servers
            await asyncio.sleep(_ENOUGH_SECONDS)

    async def _serve(self, server: SGLangServer) -> None:
        """Has a server answer requests until it has failed; cancelled once the queue is finished."""
        while True:
            await self._wait_until_ready(server)
            if server.state is ServerState.FAILED:
                return
            try:
                await self._open(server)
            except* ServerLost as group:
                await server.report_lost(_first(group))
            except* _StaleAnswer as group:
                server.report_stale(_first(group))

    async def _open(self, server: SGLangServer) -> None:
        """Gives a server requests until it is lost or answers with other weights; raises ServerLost or _StaleAnswer."""
        inbox: asyncio.Queue[int] = asyncio.Queue()
        self._inboxes[server] = inbox
        self._place()
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._watch(server))
                tasks.create_task(self._watch_label(server))
                num_at_once = self._max_at_server
                for _ in range(num_at_once if self._queue.is_open else min(num_at_once, len(self._queue.requests))):
                    tasks.create_task(self._send_requests(server, inbox))
        finally:
            del self._inboxes[server]
            prompts = list(self._prompts_of[server])
            self._prompts_of[server].clear()
            for prompt_ids in prompts:
                self._note_returned(prompt_ids)
            while not inbox.empty():
                index = inbox.get_nowait()
                self._remove(server, index)
                if not self._queue.finished.is_set():
                    self._untake(index)
            self._place()

    def _place(self) -> None:
        """Gives pending requests to servers that have room."""
        queue = self._queue
        while self._may_place and queue.pending and (room := self._servers_with_room()):
            longest = None if self._returned else self._longest_known()
            prompts_of = self._prompts_of
            server = next((s for s in room if (longest in prompts_of[s] if longest else prompts_of[s])), None)
            if server is None or self._returned:
                server = min(room, key=self._tokens_under_way.__getitem__)
                prompt_ids, num_samples = self._next_prompt(longest), self._max_of_prompt()
            else:
                prompt_ids = next(iter(self._prompts_of[server])) if longest is None else longest
                num_samples = self._prompts_of[server].pop(prompt_ids)
            self._prompts_of[server] = {prompt_ids: num_samples, **self._prompts_of[server]}
            self._place_sample(server)

    def _longest_known(self) -> tuple[int, ...] | None:
        """Returns the prompt of the first pending request if its length is known: the longest of its step that waits.

        A response that begins late and is long makes a step longer by more than reading its prompt again takes, so it
        comes before the rest of a shorter group.
        """
        pending = self._queue.pending
        prompt_ids = min(pending, key=lambda prompt_ids: pending[prompt_ids][0])
        is_known = self._queue.requests[pending[prompt_ids][0]].expected_tokens is not None
        return prompt_ids if is_known else None

    def _next_prompt(self, longest: tuple[int, ...] | None) -> tuple[int, ...]:
        """Removes and returns the next prompt: a returned one, `longest`, one that no server has, or a server's."""
        if self._returned:
            return self._returned.pop(0)
        prompts, prompt_ids = next(
            (prompts, ids) for prompts in self._prompts_of.values() for ids in prompts if longest in (None, ids)
        )
        del prompts[prompt_ids]
        return prompt_ids

    def _max_of_prompt(self) -> int:
        """Returns the samples of a prompt that a server gets at a time: all would leave servers without work."""
        return ceil(self._num_replicas * len(self._queue.requests) / len(self._servers))

    def _place_sample(self, server: SGLangServer) -> None:
        """Gives a server the next sample of the first prompt that it has."""
        prompts = self._prompts_of[server]
        prompt_ids = next(iter(prompts))
        index = self._queue.take(prompt_ids)
        prompts[prompt_ids] -= 1
        if prompt_ids not in self._queue.pending:
            del prompts[prompt_ids]
        elif not prompts[prompt_ids]:
            # The rest of the prompt stays before the prompts that were asked for later.
            self._prompts_of[None] = {prompt_ids: prompts.pop(prompt_ids), **self._prompts_of[None]}
        expected = self._queue.expected_tokens(index)
        self._at_server[server][index] = expected
        self._tokens_under_way[server] += expected
        self._inboxes[server].put_nowait(index)

    def _remove(self, server: SGLangServer, index: int) -> None:
        """Ends the count of a request at a server."""
        self._tokens_under_way[server] -= self._at_server[server].pop(index)

    def _servers_with_room(self) -> list[SGLangServer]:
        return [s for s in self._order if s in self._inboxes and len(self._at_server[s]) < self._max_at_server]

    async def _wait_until_ready(self, server: SGLangServer) -> None:
        """Returns once the server has the current weights or has failed."""

        def waiting() -> None:
            if not self._is_updating and all(other.label != self._label for other in self._servers):
                self._no_current_weights()

        while server.state is not ServerState.FAILED:
            await server.connect()
            if await server.wait_for_weights(lambda: self._label, waiting):
                return

    async def _send_requests(self, server: SGLangServer, inbox: asyncio.Queue[int]) -> None:
        """Sends the server its requests, one after another."""
        queue = self._queue
        while True:
            index = await inbox.get()
            if queue.is_ending:
                self._remove(server, index)
                queue.untake(index)
                continue
            rid = f"{self._token}-{uuid.uuid4().hex[:12]}"
            queue.at_servers[rid] = server.client
            self._settings.timeline.request_begins(rid, queue.requests[index].label, server.index)
            answer: dict[str, Any] = {"finish": "refused"}
            oldest = self._versions[self._label]
            try:
                generated = await server.client.generate(
                    rid,
                    queue.input_ids(index),
                    queue.options(index, self._stop_token_id),
                    # What older weights have cached stays in the server, under their label.
                    cache_key=self._label if self._settings.keep_cache else None,
                )
                answer = _described(generated)
                completion = self._completion(server, index, generated, oldest=oldest)
            except (ServerLost, _StaleAnswer, asyncio.CancelledError) as error:
                answer["finish"] = "cancelled" if isinstance(error, asyncio.CancelledError) else str(error)
                if not queue.finished.is_set():
                    lost_with = (
                        ServerLost(f"{server.url} was lost") if isinstance(error, asyncio.CancelledError) else error
                    )
                    self._put_back(index, lost_with)
                raise
            finally:
                del queue.at_servers[rid]
                self._settings.timeline.request_ends(rid, answer)
                self._remove(server, index)
            if completion.finish_reason is None and not queue.is_ending:
                self._put_back(index, ServerLost(f"{server.url}: another client aborted {rid}"))
            else:
                server.report_answer()
                queue.complete(index, completion)
            self._place()

    def _put_back(self, index: int, error: Exception) -> None:
        self.num_retries += 1
        self._queue.put_back(index, error)
        self._note_returned(self._queue.requests[index].prompt_ids)

    def _untake(self, index: int) -> None:
        self._queue.untake(index)
        self._note_returned(self._queue.requests[index].prompt_ids)

    def _note_new(self, prompt_ids: tuple[int, ...]) -> None:
        """Lets any server have a prompt whose requests are new, unless a server has it."""
        if prompt_ids in self._queue.pending and not self._is_noted(prompt_ids):
            self._prompts_of[None][prompt_ids] = 0

    def _note_returned(self, prompt_ids: tuple[int, ...]) -> None:
        """Lets the next server with room have a prompt of which a request may be pending again, unless a server has it.

        Such prompts are placed in the order in which they were asked for.
        """
        pending = self._queue.pending
        if prompt_ids in pending:
            self._prompts_of[None].pop(prompt_ids, None)
            if not self._is_noted(prompt_ids):
                self._returned.append(prompt_ids)
                self._returned.sort(key=lambda prompt_ids: pending[prompt_ids][0])

    def _is_noted(self, prompt_ids: tuple[int, ...]) -> bool:
        return prompt_ids in self._returned or any(prompt_ids in prompts for prompts in self._prompts_of.values())

    def _completion(self, server: SGLangServer, index: int, generated: Generated, *, oldest: int) -> Completion:
        """Returns the completion of a request. oldest: version of the weights that the server had when it was sent."""
        versions = [(self._versions.get(label, -1), end) for label, end in generated.weight_labels]
        if generated.token_ids and min(version for version, _ in versions) < oldest:
            raise _StaleAnswer(
                f"answered with weights {', '.join(label for label, _ in generated.weight_labels)}, not {self._label}; "
                "its answers are discarded, and it waits for the current weights"
            )
        if self._settings.keep_cache:  # every token depends on the cache that the first weights computed
            versions = [(versions[0][0], len(generated.token_ids))]
        is_stopped = self._queue.is_stopped(index, generated.token_ids, self._stop_token_id)
        if generated.finish["type"] == "stop" and not is_stopped:
            raise RequestRefused(
                f"{server.url} ended a response at {generated.finish.get('matched')!r}, which is not "
                f"prompt.stop_token (id {self._stop_token_id}); start the server with --skip-tokenizer-init, from a "
                "config.json and generation_config.json without other end tokens"
            )
        return self._queue.completion(index, generated, versions=versions, stop_token_id=self._stop_token_id)

    async def _watch(self, server: SGLangServer) -> None:
        """Raises ServerLost if the server answers no health check for rollout.sglang.health_seconds."""
        silence, clock = self._settings.config.health_seconds, asyncio.get_running_loop().time
        last_answer = clock()
        while True:
            await asyncio.sleep(silence / 4)
            num_updates = self._num_updates
            is_healthy = await server.client.is_healthy(
                max(silence - (clock() - last_answer), self._settings.poll_seconds)
            )
            if is_healthy or self._is_updating or self._num_updates > num_updates:  # a paused server may not answer
                last_answer = clock()
            elif clock() - last_answer >= silence:
                raise ServerLost(f"{server.url} answered no health check in {silence:g} seconds")

    async def _watch_label(self, server: SGLangServer) -> None:
        """Raises _StaleAnswer once the server, which may have no request, was started again without the weights."""
        while self._is_updating or server.label == self._label:
            await asyncio.sleep(self._settings.poll_seconds)
        raise _StaleAnswer("was lost and does not have the current weights yet")


class _StaleAnswer(Exception):
    """A server has, or answered with, other weights than the current weights."""


def _described(generated: Generated) -> dict[str, Any]:
    """Returns what a timeline shows of an answer."""
    weights = ", ".join(label for label, _ in generated.weight_labels)
    return {"finish": generated.finish["type"], "tokens": len(generated.token_ids), "weights": weights}


def _raise_failure(task: asyncio.Task[None]) -> None:
    """Raises the error of an ended task, without the exception groups around it."""
    try:
        task.result()
    except BaseExceptionGroup as group:
        raise _first(group) from group


def _first(group: BaseExceptionGroup[Any]) -> Exception:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
