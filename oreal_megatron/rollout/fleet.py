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
from oreal_megatron.rollout.client import KV_CACHE, WEIGHTS, RequestRefused, ServerLost
from oreal_megatron.rollout.dispatch import Dispatch, Weights, no_server
from oreal_megatron.rollout.engine import Completion, GenerationRequest
from oreal_megatron.rollout.member import POLL_SECONDS, Member, Terms
from oreal_megatron.rollout.server import ASLEEP, NO_WEIGHTS, choose_port, resting_mark
from oreal_megatron.rollout.work import Work


class Fleet:
    """The servers, launched or attached to."""

    def __init__(self, terms: Terms, *, stop_token_id: int, config_json: Mapping[str, Any]):
        """config_json: of the model, for what servers start from."""
        self._terms = terms
        self._config = terms.config
        self._stop_token_id = stop_token_id
        self._config_json = config_json
        self._token = uuid.uuid4().hex[:8]
        self._weights: Weights | None = None
        self._supervisors: list[asyncio.Task[None]] = []
        self._is_first = True
        self._is_resting = False
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

        wait: for servers that are starting, too; of the first weights, always, and where servers share the trainer's
        devices, which are theirs now alone. Otherwise these get the weights later.

        Raises:
            NoServerError: no server can be used; or, of the first weights, one server cannot.
        """
        self._weights = weights
        if not self.members:
            self._start()
        if self._config.shares_devices:
            self._mark_resting(False)
        if wait or self._is_first or self._config.shares_devices:
            await asyncio.gather(*(member.reached() for member in self.members))
        self._check_usable()
        chosen = [m for m in self.members if m.is_up and m.label != weights.label and not m.lock.locked()]
        await asyncio.gather(*(self._pause(member) for member in chosen))
        return [member for member in chosen if member.is_up]

    def _start(self) -> None:
        model = self._terms.launcher.model
        model.mkdir(parents=True, exist_ok=True)
        write_atomically(model / "config.json", json.dumps(self._config_json, indent=2) + "\n")
        if self._config.urls:
            self.members = [Member(i, url, "attached", self._terms) for i, url in enumerate(self._config.urls)]
        else:
            ports = [choose_port(self._config, number) for number in range(self._config.num_servers)]
            self.members = [
                Member(i, f"http://{self._config.host}:{port}", "launched", self._terms) for i, port in enumerate(ports)
            ]
        self._supervisors = [asyncio.create_task(self._supervise(member)) for member in self.members]

    async def _supervise(self, member: Member) -> None:
        """Has a lost server back, started anew if it is ours, whether or not anybody waits for it: in time for the next
        weights."""
        while member.given_up is None:
            await asyncio.sleep(POLL_SECONDS)
            # While they rest, the devices are the trainer's.
            if member.is_down and not self._is_resting and not member.lock.locked():
                await member.reached()

    async def _pause(self, member: Member) -> None:
        await member.lock.acquire()
        try:
            if WEIGHTS in member.has_released:
                await member.client.resume_memory([WEIGHTS])
                member.has_released -= {WEIGHTS}
            else:
                await member.client.pause()
            await member.client.begin_update()
        except (ServerLost, RequestRefused) as error:
            await member.lose(error)
            member.lock.release()

    async def settle(self, opened: Sequence[Member], failures: Mapping[str, str]) -> None:
        """Servers that have the weights go on; those that failed (by URL, with the reason) are lost.

        Servers that share the trainer's devices go on with `wake`.

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
            await member.client.end_update()
            if not self._config.shares_devices:
                await self._continue(member, self._weights.label)
            member.label = self._weights.label
        except (ServerLost, RequestRefused) as error:
            if not (member.is_launched or self._config.shares_devices):
                # It may be somebody else's too: it goes on, with weights that nobody asks for.
                with contextlib.suppress(ServerLost, RequestRefused):
                    await member.client.end_update()
                    await self._continue(member, NO_WEIGHTS)
            if self._is_first:
                member.give_up(str(error))
            else:
                await member.lose(error)
        finally:
            member.lock.release()

    async def _continue(self, member: Member, label: str) -> None:
        """From a paused server to one that answers; what it has released comes back."""
        if member.has_released:
            await member.client.resume_memory(sorted(member.has_released))
            member.has_released = frozenset()
        await member.client.flush()
        await member.client.label_weights(label)
        await member.client.resume()

    def _check_usable(self) -> None:
        """Raises NoServerError where no server is left; or, before any had weights, where one cannot be used."""
        failed = [member for member in self.members if member.given_up is not None]
        if failed and (self._is_first or len(failed) == len(self.members)):
            raise no_server(self.members, failed)

    async def follow(self, version: int, label: str, urls: Sequence[str]) -> None:
        """For a fleet of another process: its servers are to be used while they have weights `label`."""
        self._weights = Weights(version=version, label=label)
        if not self.members:
            self.members = [Member(index, url, "followed", self._terms) for index, url in enumerate(urls)]
        for member in self.members:
            # The label is that of the weights before these: the server says what it has.
            member.forget()

    # ---- devices in turns with the trainer -----------------------------------------------------------------------

    async def wake(self) -> None:
        """Servers that hold the current weights and share the trainer's devices take what they need to generate.

        Raises:
            NoServerError: no server can be used.
        """
        assert self._weights is not None
        label = self._weights.label
        await asyncio.gather(*(self._wake(member, label) for member in self.members if member.label == label))
        self._check_usable()

    async def _wake(self, member: Member, label: str) -> None:
        async with member.lock:
            try:
                await self._continue(member, label)
            except (ServerLost, RequestRefused) as error:
                await member.lose(error)

    async def rest(self) -> None:
        """Servers that share the trainer's devices give weights and KV memory back; `open` has them take both again.

        A server that is starting is waited for: until then nobody knows what it takes.

        Raises:
            NoServerError: no server is left.
        """
        self._mark_resting(True)
        await asyncio.gather(*(self._rest(member) for member in self.members))
        self._check_usable()

    async def _rest(self, member: Member) -> None:
        async with member.lock:
            if not member.is_up:
                await member.end()
                return
            try:
                if not member.has_released:
                    await member.client.pause()
                # Said first: whoever finds the server so knows that it has no weights.
                await member.client.label_weights(ASLEEP)
                member.label = ASLEEP
                await member.client.release_memory(sorted({WEIGHTS, KV_CACHE} - member.has_released))
                member.has_released = frozenset({WEIGHTS, KV_CACHE})
            except (ServerLost, RequestRefused) as error:
                await member.lose(error)

    def _mark_resting(self, is_resting: bool) -> None:
        """Tells whoever else starts servers (launch/serve.py) whether they may."""
        self._is_resting = is_resting
        mark = resting_mark(self._terms.launcher.model)
        if is_resting:
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
        dispatch = Dispatch(
            Work(requests, sampling, completed),
            self.members,
            self._weights,
            self._config,
            token=self._token,
            stop_token_id=self._stop_token_id,
            is_starving=self._starving,
        )
        try:
            await dispatch.finish(is_enough)
        finally:
            self.num_retries += dispatch.num_retries

    def _starving(self) -> None:
        if not self._has_told:
            self._has_told = True
            self.on_starving()

    async def close(self) -> None:
        """Ends launched servers; those that were running before us go on."""
        for supervisor in self._supervisors:
            supervisor.cancel()
        await asyncio.gather(*(member.end() for member in self.members))
        await asyncio.gather(*(member.client.close() for member in self.members))
