"""Several SGLang servers as one: work is dealt out, lost servers come back, nobody generates with old weights.

All of it runs on one event loop, in one thread of the trainer's main process.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from oreal_megatron.config import SamplingConfig, SGLangConfig
from oreal_megatron.files import write_atomically
from oreal_megatron.rollout.client import (
    Generated,
    RequestRefused,
    ServerClient,
    ServerDescription,
    ServerLost,
)
from oreal_megatron.rollout.engine import Completion, GenerationRequest
from oreal_megatron.rollout.server import (
    NO_WEIGHTS,
    ServerProcess,
    ServerStartError,
    choose_port,
    launch_command,
    launch_environment,
    start_directory,
)
from oreal_megatron.rollout.work import LostTooOftenError, Work

_POLL_SECONDS = 0.5
# Between two looks at whether a step has enough, and between two aborts of what is under way still.
_ENOUGH_SECONDS = 0.1


class NoServerError(RuntimeError):
    """No server is left that could answer; the message says why of each."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """What servers must have before they get a prompt."""

    version: int
    label: str
    """What servers call them: unlike any other run's."""


@dataclass
class Member:
    """One server of the fleet."""

    index: int
    client: ServerClient
    process: ServerProcess | None
    """None: it was running before us, or it is to be started."""
    is_ours: bool
    label: str | None = None
    """Of the weights that it was seen to have since contact was last lost; None: not seen yet."""
    num_restarts: int = 0
    """Since it last answered a request."""
    is_up: bool = False
    """Whether it has answered, as our model's, since contact was last lost."""
    was_up: bool = False
    """Whether it ever has."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held by who starts it or publishes to it."""
    given_up: str | None = None
    """Why it gets no more requests, or None."""


class Fleet:
    """The servers, launched or attached to."""

    def __init__(
        self,
        config: SGLangConfig,
        *,
        dtype: str,
        max_sequence_length: int,
        stop_token_id: int,
        directory: Path,
        config_json: Mapping[str, Any],
        weight_loader: str,
        check: Callable[[str, ServerDescription], None],
        say: Callable[[str], None],
    ):
        """directory: for logs, and for what servers start from. config_json: of the model. weight_loader: name of the
        function by which servers take orders of publications. check: told url and description; raises ValueError where
        a server is not what the run needs.
        """
        self._config = config
        self._dtype = dtype
        self._max_sequence_length = max_sequence_length
        self._stop_token_id = stop_token_id
        self._directory = directory
        self._config_json = config_json
        self._weight_loader = weight_loader
        self._check = check
        self._say = say
        self._token = uuid.uuid4().hex[:8]
        self._weights: Weights | None = None
        self._owns = True
        self._supervisor: asyncio.Task[None] | None = None
        self._is_first = True
        self._has_told = False
        self.on_starving: Callable[[], None] = lambda: None
        """The owner's: called once until the next `settle`, where no server has the weights and one waits for them."""
        self.members: list[Member] = []
        self.num_retries = 0
        """Responses that were asked for again, over the fleet's life."""

    def label(self, version: int) -> str:
        """What the servers call a weight version. No other run calls its own so."""
        return f"{version}-{self._token}"

    # ---- weights -------------------------------------------------------------------------------------------------

    async def open(self, weights: Weights, *, wait: bool) -> list[Member]:
        """The servers that are to get `weights`, paused. Until `settle` they are nobody else's.

        wait: for servers that are starting, too; of the first weights, always. Otherwise these get the weights later.

        Raises:
            NoServerError: no server can be used; or, of the first weights, one server cannot.
        """
        self._weights = weights
        if not self.members:
            model = start_directory(self._directory)
            model.mkdir(parents=True, exist_ok=True)
            write_atomically(model / "config.json", json.dumps(self._config_json, indent=2) + "\n")
            self._assemble(self._config.urls or self._new_urls())
            self._supervisor = asyncio.create_task(self._supervise())
        if wait or self._is_first:
            await asyncio.gather(*(self._reached(member) for member in self.members))
        self._check_usable()
        chosen = [m for m in self.members if m.is_up and m.label != weights.label and not m.lock.locked()]
        await asyncio.gather(*(self._pause(member) for member in chosen))
        return [member for member in chosen if member.is_up]

    async def _pause(self, member: Member) -> None:
        await member.lock.acquire()
        try:
            await member.client.pause()
            await member.client.begin_update()
        except (ServerLost, RequestRefused) as error:
            await self._lost_locked(member, error)
            member.lock.release()

    async def settle(self, opened: Sequence[Member], failures: Mapping[str, str]) -> None:
        """Servers that have the weights go on; those that failed (by URL, with the reason) are lost.

        Raises:
            NoServerError: as `open`.
        """
        await asyncio.gather(*(self._settle(member, failures.get(member.client.url)) for member in opened))
        self._has_told = False
        self._check_usable()
        self._is_first = False

    async def _settle(self, member: Member, failure: str | None) -> None:
        assert self._weights is not None
        try:
            if failure is not None:
                raise ServerLost(f"{member.client.url} does not have the weights: {failure}")
            await self._continue(member, self._weights.label)
            member.label = self._weights.label
        except (ServerLost, RequestRefused) as error:
            if not member.is_ours:
                # It may be somebody else's too: it goes on, with weights that nobody asks for.
                with contextlib.suppress(ServerLost, RequestRefused):
                    await self._continue(member, NO_WEIGHTS)
            if self._is_first:
                self._give_up(member, str(error))
            else:
                await self._lost_locked(member, error)
        finally:
            member.lock.release()

    async def _continue(self, member: Member, label: str) -> None:
        await member.client.end_update()
        await member.client.flush()
        await member.client.label_weights(label)
        await member.client.resume()

    def _check_usable(self) -> None:
        """Raises NoServerError where no server is left; or, before any had weights, where one cannot be used."""
        failed = [member for member in self.members if member.given_up is not None]
        if failed and (self._is_first or len(failed) == len(self.members)):
            raise self._no_server(failed)

    def _new_urls(self) -> list[str]:
        numbers = range(self._config.num_servers)
        return [f"http://{self._config.host}:{choose_port(self._config, number)}" for number in numbers]

    def _assemble(self, urls: Sequence[str]) -> None:
        self.members = [
            Member(
                index=index,
                client=ServerClient(
                    url,
                    max_concurrency=self._config.max_concurrency,
                    control_seconds=self._config.control_seconds,
                ),
                process=None,
                is_ours=self._owns and not self._config.urls,
            )
            for index, url in enumerate(urls)
        ]

    def _no_server(self, failed: Sequence[Member]) -> NoServerError:
        reasons = "\n".join(f"  {member.client.url}: {member.given_up}" for member in failed)
        return NoServerError(f"{len(failed)} of {len(self.members)} rollout servers cannot be used:\n{reasons}")

    async def follow(self, version: int, label: str, urls: Sequence[str]) -> None:
        """For a fleet of another process: its servers are to be used while they have weights `label`."""
        self._owns = False
        self._weights = Weights(version=version, label=label)
        if not self.members:
            self._assemble(urls)
        for member in self.members:
            # The label is that of the weights before these: the server says what it has.
            member.given_up, member.num_restarts, member.label = None, 0, None

    async def _supervise(self) -> None:
        """Starts launched servers anew when they end, whoever is using them."""
        while True:
            await asyncio.sleep(_POLL_SECONDS)
            ended = [
                member
                for member in self.members
                if member.is_ours
                and not member.lock.locked()
                and (member.process is None or member.process.exit_code is not None)
            ]
            await asyncio.gather(*(self._reached(member) for member in ended))

    async def _bring_up(self, member: Member) -> None:
        """Until the member has the current weights, or is given up."""
        while member.given_up is None:
            await self._reached(member)
            if await self._has_weights(member):
                return

    async def _reached(self, member: Member) -> None:
        """Until the member answers, or is given up."""
        async with member.lock:
            while member.given_up is None:
                try:
                    await self._reach(member)
                    member.is_up = member.was_up = True
                    return
                except ServerLost as error:
                    await self._lost_locked(member, error)
                except ServerStartError as error:
                    if member.was_up:
                        await self._lost_locked(member, error)
                    else:
                        self._give_up(member, str(error))
                except ValueError as error:
                    self._give_up(member, str(error))

    async def _has_weights(self, member: Member) -> bool:
        """Waits until a publication has reached the member; false if it is lost meanwhile."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + self._config.startup_seconds
        while member.given_up is None and (member.is_up or not self._owns):
            assert self._weights is not None
            if not self._owns and member.label is None:
                with contextlib.suppress(ServerLost):
                    member.label = await member.client.weight_label()
            if member.label == self._weights.label:
                return True
            if not self._owns and clock() > deadline:
                self._give_up(member, f"{member.client.url} did not get the current weights in time")
            if not self._owns:
                member.label = None  # to be asked for again
            elif not self._has_told and all(other.label != self._weights.label for other in self.members):
                self._has_told = True
                self.on_starving()
            await asyncio.sleep(_POLL_SECONDS / 5)
        return False

    async def _reach(self, member: Member) -> None:
        """Starts the member if it is ours and not running; waits until it answers.

        Raises:
            ServerLost: it does not, in time. ServerStartError: it cannot start. ValueError: it is another model's.
        """
        if not self._owns:
            return
        if member.is_ours and member.process is None:
            await self._start(member)
        elif member.process is not None and member.process.exit_code is not None:
            raise ServerLost(f"{member.client.url} ended with exit code {member.process.exit_code}")
        elif not member.is_ours and member.label is None:
            member.label = (await self._described(member)).weight_label

    async def _start(self, member: Member) -> None:
        command = launch_command(
            self._config,
            model=start_directory(self._directory).absolute(),
            weight_loader=self._weight_loader,
            port=int(member.client.url.rsplit(":", 1)[1]),
            dtype=self._dtype,
            max_sequence_length=self._max_sequence_length,
        )
        log = self._directory / f"server_{member.index}.log"
        member.process = ServerProcess(command, launch_environment(self._config), log)
        await self._described(member)
        while not await member.client.is_healthy(self._config.health_seconds):
            self._check_alive(member)
            await asyncio.sleep(_POLL_SECONDS)

    async def _described(self, member: Member) -> ServerDescription:
        """What the server says of itself, when it does.

        Raises:
            ValueError: it is not what the run needs.
        """
        url, found = member.client.url, await self._until_it_answers(member)
        self._check(url, found)
        if self._weight_loader not in found.weight_loaders:
            raise ValueError(
                f"{url} was started without --custom-weight-loader {self._weight_loader}, by which it would take and "
                "audit weights; start it with that option and this package on its PYTHONPATH"
            )
        for key, has, wanted in (
            ("tensor", found.tensor, self._config.tensor),
            ("device", found.device, self._config.device),
        ):
            if has != wanted:
                raise ValueError(f"{url} has {key} {has}, rollout.sglang.{key} is {wanted}: they must be the same")
        return found

    async def _until_it_answers(self, member: Member) -> ServerDescription:
        """What the server says of itself; paused ones answer too."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + self._config.startup_seconds
        while True:
            self._check_alive(member)
            try:
                return await asyncio.wait_for(member.client.describe(), max(deadline - clock(), _POLL_SECONDS))
            except (ServerLost, TimeoutError) as error:
                if clock() > deadline:
                    raise ServerLost(
                        f"{member.client.url} gave no answer in {self._config.startup_seconds:g} seconds "
                        f"(rollout.sglang.startup_seconds){_log_of(member)}"
                    ) from error
            await asyncio.sleep(_POLL_SECONDS)

    def _check_alive(self, member: Member) -> None:
        if member.process is not None and (code := member.process.exit_code) is not None:
            raise ServerStartError(f"{member.client.url} ended with exit code {code} while it started{_log_of(member)}")

    async def _lost(self, member: Member, error: Exception) -> None:
        """Whoever works with it has lost contact; nothing happens where somebody else has noticed before."""
        if member.is_up:
            async with member.lock:
                await self._lost_locked(member, error)

    async def _lost_locked(self, member: Member, error: Exception) -> None:
        """Ends what is left of a launched server, so that it is started anew; gives up what cannot be had back."""
        member.label, member.is_up = None, False
        self._say(f"[yellow]rollout server {member.index} lost: {error}[/]")
        if member.is_ours:
            await self._end(member)
        elif member.num_restarts:
            # Contact was lost again before it answered anything: `_reach` has waited as long as it may.
            self._give_up(member, str(error))
        if member.is_ours and member.num_restarts >= self._config.max_restarts:
            self._give_up(member, f"{error}; restarted {member.num_restarts} times (rollout.sglang.max_restarts)")
        member.num_restarts += 1

    def _give_up(self, member: Member, why: str) -> None:
        member.given_up, member.label, member.is_up = why, None, False
        self._say(f"[red]rollout server {member.index} given up: {why}[/]")

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
        work = Work(requests, sampling, completed)
        if work.finished.is_set():
            return
        servers = [asyncio.create_task(self._serve(member, work)) for member in self.members]
        waiting = asyncio.create_task(work.finished.wait())
        ending = asyncio.create_task(self._end_early(work, is_enough))
        try:
            while not work.finished.is_set():
                await asyncio.wait([waiting, *servers], return_when=asyncio.FIRST_COMPLETED)
                ended = [server for server in servers if server.done()]
                for server in ended:
                    _raise_failure(server)
                servers = [server for server in servers if not server.done()]
                if not servers and not work.finished.is_set():
                    raise self._no_server(self.members)
        finally:
            for task in (waiting, ending, *servers):
                task.cancel()
            await asyncio.gather(waiting, ending, *servers, return_exceptions=True)

    async def _end_early(self, work: Work, is_enough: Callable[[], bool] | None) -> None:
        """Ends the work once there is enough."""
        if is_enough is None:
            return
        while not is_enough():
            await asyncio.sleep(_ENOUGH_SECONDS)
        work.end()
        while work.at_servers:  # an abort that overtakes its request has no effect
            aborts = [client.abort(rid) for rid, client in work.at_servers.items()]
            await asyncio.gather(*aborts, return_exceptions=True)  # lost servers are noticed elsewhere
            await asyncio.sleep(_ENOUGH_SECONDS)

    async def _serve(self, member: Member, work: Work) -> None:
        """Keeps one server full until the work is finished or the server is given up."""
        while True:
            await self._bring_up(member)
            if member.given_up is not None:
                return
            try:
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(self._watch(member))
                    for _ in range(min(self._config.max_concurrency, len(work.requests))):
                        tasks.create_task(self._work(member, work))
            except* ServerLost as group:
                await self._lost(member, _first(group))
            except* _Stale as group:
                member.label = None
                self._say(f"[yellow]rollout server {member.index}: {_first(group)}[/]")

    async def _work(self, member: Member, work: Work) -> None:
        """One request after another."""
        while True:
            index = await work.pending.get()
            rid = f"{self._token}-{uuid.uuid4().hex[:12]}"
            work.at_servers[rid] = member.client
            try:
                generated = await member.client.generate(
                    rid, work.input_ids(index), work.options(index, self._stop_token_id)
                )
                completion = self._completed(member, work, index, generated)
            except (ServerLost, _Stale, asyncio.CancelledError) as error:
                if not work.finished.is_set():
                    lost = error if isinstance(error, Exception) else ServerLost(member.client.url)
                    self._put_back(work, index, lost)
                raise
            finally:
                del work.at_servers[rid]
            if completion.finish_reason is None and not work.is_ending:
                self._put_back(work, index, ServerLost(f"{member.client.url}: somebody else aborted {rid}"))
                continue
            member.num_restarts = 0
            work.complete(index, completion)

    def _put_back(self, work: Work, index: int, error: Exception) -> None:
        self.num_retries += 1
        try:
            work.put_back(index, error)
        except LostTooOftenError as often:
            raise NoServerError(str(often)) from error

    def _completed(self, member: Member, work: Work, index: int, generated: Generated) -> Completion:
        assert self._weights is not None
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
        return work.completion(index, generated, version=version, stop_token_id=stop)

    async def _watch(self, member: Member) -> None:
        """Raises ServerLost where a server that accepts requests does not answer any more."""
        silence, clock = self._config.health_seconds, asyncio.get_running_loop().time
        last_sign = clock()
        while True:
            await asyncio.sleep(silence / 4)
            if await member.client.is_healthy(max(silence - (clock() - last_sign), _POLL_SECONDS)):
                last_sign = clock()
            elif clock() - last_sign >= silence:
                raise ServerLost(f"{member.client.url} gave no sign of life in {silence:g} seconds")

    # ---- the end -------------------------------------------------------------------------------------------------

    async def close(self) -> None:
        """Ends launched servers; those that were running before us go on."""
        if self._supervisor is not None:
            self._supervisor.cancel()
        await asyncio.gather(*(self._end(member) for member in self.members))
        await asyncio.gather(*(member.client.close() for member in self.members))

    async def _end(self, member: Member) -> None:
        if member.process is not None:
            await asyncio.to_thread(member.process.stop)
            member.process = None


class _Stale(Exception):
    """A server answered with other weights than the current ones."""


def _raise_failure(task: asyncio.Task[None]) -> None:
    """The error of an ended task, without the groups around it."""
    try:
        task.result()
    except BaseExceptionGroup as group:
        raise _first(group) from group


def _log_of(member: Member) -> str:
    return f"; {member.process.log} ends:\n{member.process.log_tail()}" if member.process else ""


def _first(group: BaseExceptionGroup[Any]) -> Exception:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
