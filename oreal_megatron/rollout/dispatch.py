"""Dealing requests out to servers that have the current weights, until every one is answered once.

A server is kept full while it answers; what it was working on when it is lost goes to the others, or waits for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from oreal_megatron.config import SGLangConfig
from oreal_megatron.rollout.client import Generated, RequestRefused, ServerLost
from oreal_megatron.rollout.engine import Completion
from oreal_megatron.rollout.member import POLL_SECONDS, Member
from oreal_megatron.rollout.work import LostTooOftenError, Work

# Between two looks at whether a step has enough, and between two aborts of what is under way still.
_ENOUGH_SECONDS = 0.1


class NoServerError(RuntimeError):
    """No server is left that could answer; the message says why of each."""


def no_server(members: Sequence[Member], failed: Sequence[Member]) -> NoServerError:
    reasons = "\n".join(f"  {member.client.url}: {member.given_up}" for member in failed)
    return NoServerError(f"{len(failed)} of {len(members)} rollout servers cannot be used:\n{reasons}")


@dataclass(frozen=True, kw_only=True)
class Weights:
    """What servers must have before they get a prompt."""

    version: int
    label: str
    """What servers call them: unlike any other run's."""


class Dispatch:
    """One call's work, on its way to the members of a fleet and back."""

    def __init__(
        self,
        work: Work,
        members: Sequence[Member],
        weights: Weights,
        config: SGLangConfig,
        *,
        token: str,
        stop_token_id: int,
        is_starving: Callable[[], None],
    ):
        """token: begins request ids, unlike any other run's. is_starving: told, again and again, while a member of ours
        waits for weights that no server has.
        """
        self._work = work
        self._members = members
        self._weights = weights
        self._config = config
        self._token = token
        self._stop_token_id = stop_token_id
        self._is_starving = is_starving
        self.num_retries = 0
        """Responses that were asked for again."""

    async def finish(self, is_enough: Callable[[], bool] | None) -> None:
        """See Fleet.generate."""
        work = self._work
        if work.finished.is_set():
            return
        servers = [asyncio.create_task(self._serve(member)) for member in self._members]
        waiting = asyncio.create_task(work.finished.wait())
        ending = asyncio.create_task(self._end_early(is_enough))
        try:
            while not work.finished.is_set():
                await asyncio.wait([waiting, *servers], return_when=asyncio.FIRST_COMPLETED)
                ended = [server for server in servers if server.done()]
                for server in ended:
                    _raise_failure(server)
                servers = [server for server in servers if not server.done()]
                if not servers and not work.finished.is_set():
                    raise no_server(self._members, self._members)
        finally:
            for task in (waiting, ending, *servers):
                task.cancel()
            await asyncio.gather(waiting, ending, *servers, return_exceptions=True)

    async def _end_early(self, is_enough: Callable[[], bool] | None) -> None:
        """Ends the work once there is enough."""
        if is_enough is None:
            return
        while not is_enough():
            await asyncio.sleep(_ENOUGH_SECONDS)
        self._work.end()
        while self._work.at_servers:  # an abort that overtakes its request has no effect
            aborts = [client.abort(rid) for rid, client in self._work.at_servers.items()]
            await asyncio.gather(*aborts, return_exceptions=True)  # lost servers are noticed elsewhere
            await asyncio.sleep(_ENOUGH_SECONDS)

    async def _serve(self, member: Member) -> None:
        """Keeps one server full until the work is finished or the server is given up."""
        while True:
            await self._bring_up(member)
            if member.given_up is not None:
                return
            try:
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(self._watch(member))
                    for _ in range(min(self._config.max_concurrency, len(self._work.requests))):
                        tasks.create_task(self._ask(member))
            except* ServerLost as group:
                await member.lost(_first(group))
            except* _Stale as group:
                member.label = None
                member.say(str(_first(group)))

    async def _bring_up(self, member: Member) -> None:
        """Until the member has the current weights, or is given up."""
        while member.given_up is None:
            await member.reached()
            if await self._has_weights(member):
                return

    async def _has_weights(self, member: Member) -> bool:
        """Waits until a publication has reached the member; false if it is lost meanwhile."""
        clock, label, is_followed = asyncio.get_running_loop().time, self._weights.label, member.kind == "followed"
        deadline = clock() + self._config.startup_seconds
        while member.given_up is None and (member.is_up or is_followed):
            if is_followed and member.label is None:
                with contextlib.suppress(ServerLost):
                    member.label = await member.client.weight_label()
            if member.label == label:
                return True
            if is_followed and clock() > deadline:
                member.give_up(f"{member.client.url} did not get the current weights in time")
            if is_followed:
                member.label = None  # to be asked for again
            elif all(other.label != label for other in self._members):
                self._is_starving()
            await asyncio.sleep(POLL_SECONDS / 5)
        return False

    async def _ask(self, member: Member) -> None:
        """One request after another."""
        work = self._work
        while True:
            index = await work.pending.get()
            rid = f"{self._token}-{uuid.uuid4().hex[:12]}"
            work.at_servers[rid] = member.client
            try:
                generated = await member.client.generate(
                    rid, work.input_ids(index), work.options(index, self._stop_token_id)
                )
                completion = self._completed(member, index, generated)
            except (ServerLost, _Stale, asyncio.CancelledError) as error:
                if not work.finished.is_set():
                    lost = error if isinstance(error, Exception) else ServerLost(member.client.url)
                    self._put_back(index, lost)
                raise
            finally:
                del work.at_servers[rid]
            if completion.finish_reason is None and not work.is_ending:
                self._put_back(index, ServerLost(f"{member.client.url}: somebody else aborted {rid}"))
                continue
            member.restarts.reset()
            work.complete(index, completion)

    def _put_back(self, index: int, error: Exception) -> None:
        self.num_retries += 1
        try:
            self._work.put_back(index, error)
        except LostTooOftenError as often:
            raise NoServerError(str(often)) from error

    def _completed(self, member: Member, index: int, generated: Generated) -> Completion:
        if generated.token_ids and generated.weight_labels != {self._weights.label}:
            raise _Stale(
                f"answered with weights {', '.join(sorted(generated.weight_labels))}, not {self._weights.label}; "
                "its answers are thrown away and it is brought up to date"
            )
        if generated.finish["type"] == "stop" and generated.token_ids[-1:] != (self._stop_token_id,):
            raise RequestRefused(
                f"{member.client.url} ended a response at {generated.finish.get('matched')!r}, which is not "
                f"prompt.stop_token (id {self._stop_token_id}); start the server with --skip-tokenizer-init, from a "
                "config.json and generation_config.json without other end tokens"
            )
        version, stop = self._weights.version, self._stop_token_id
        return self._work.completion(index, generated, version=version, stop_token_id=stop)

    async def _watch(self, member: Member) -> None:
        """Raises ServerLost where a server that accepts requests does not answer any more."""
        silence, clock = self._config.health_seconds, asyncio.get_running_loop().time
        last_sign = clock()
        while True:
            await asyncio.sleep(silence / 4)
            if await member.client.is_healthy(max(silence - (clock() - last_sign), POLL_SECONDS)):
                last_sign = clock()
            elif clock() - last_sign >= silence:
                raise ServerLost(f"{member.client.url} gave no sign of life in {silence:g} seconds")


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
