"""Responses of several turns: a loop of the user's own that asks the policy for tokens and adds others between them.

A response is one sequence of tokens to which the loop appends alone, so that what the model is trained on is what it
was generated from. Tokens that the policy did not generate are inserted tokens: they are never trained on.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from oreal_megatron.config import SamplingConfig
from oreal_megatron.data.prompting import PromptRenderer
from oreal_megatron.distributed.groups import ParallelGroups
from oreal_megatron.rollout.engine import ResponseGenerator
from oreal_megatron.seeds import derive_seed
from oreal_megatron.stopping import StopRequest
from oreal_megatron.types import Completion, FinishReason, GenerationRequest, WeightSpan

logger = logging.getLogger(__name__)

_HEARTBEAT_SECONDS = 2.0
"""Seconds after which ranks that wait for busy loops look whether a stop was asked for."""

Loop = Callable[..., Any]
"""The function of rollout.generation: awaited with `conversation`, `question` and `prompt_ids`."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """Tokens that the policy generated at a request."""

    text: str
    """Text of the turn, without the stop token."""
    token_ids: tuple[int, ...]
    """Token ids, with the stop token if the turn ends with it; empty where the response had no room left."""
    logprobs: tuple[float, ...]
    """Log softmax(logits / temperature) of each token, in nats."""
    weight_version: int | None
    """Version of the weights that generated the last token; None without tokens."""
    finish_reason: FinishReason
    """STOP: the turn ends with a stop token; LENGTH: a limit ended it."""

    @property
    def stopped(self) -> bool:
        return self.finish_reason is FinishReason.STOP


class Conversation:
    """A response in the making, which a loop of the user's own writes with the policy."""

    def __init__(self, request: GenerationRequest, renderer: PromptRenderer, waits: Callable[[], None]):
        """Makes an empty response. waits: called whenever the loop begins to wait for the policy."""
        self._request = request
        self._renderer = renderer
        self._waits = waits
        self._tokens: list[int] = []
        self._logprobs: list[float] = []
        self._inserted: list[tuple[int, int]] = []
        self._num_turns = 0
        self._finish_reason = FinishReason.LENGTH
        self._spans: list[WeightSpan] = []
        self.asked: GenerationRequest | None = None
        """Request for the tokens that the loop waits for; None: it waits for nothing."""
        self._answer: asyncio.Future[Completion] | None = None

    @property
    def room(self) -> int:
        """Number of tokens that the response may still have, by rollout.sampling.max_new_tokens and the context."""
        return self._request.max_new_tokens - len(self._tokens)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Token ids of the response so far."""
        return tuple(self._tokens)

    async def generate(self, max_new_tokens: int | None = None) -> Turn:
        """Has the policy go on with the response until the stop token or a limit, and returns the new tokens.

        max_new_tokens: limit of this turn; None: the room of the response.

        Raises:
            ValueError: max_new_tokens is below 1.
            RuntimeError: the conversation waits for tokens already.
        """
        if max_new_tokens is not None and max_new_tokens < 1:
            raise ValueError(f"generate(max_new_tokens={max_new_tokens}): ask for at least one token")
        if self._answer is not None:
            raise RuntimeError("generate() was called while an earlier call waits; await one after the other")
        if not self.room:
            return Turn(text="", token_ids=(), logprobs=(), weight_version=None, finish_reason=FinishReason.LENGTH)
        seed = self._request.seed
        self.asked = GenerationRequest(
            prompt_ids=(*self._request.prompt_ids, *self._tokens),
            # The first turn has the response's own seed, so that a loop of one turn generates what no loop would.
            seed=derive_seed(seed, "turn", self._num_turns) if self._num_turns else seed,
            max_new_tokens=self.room if max_new_tokens is None else min(max_new_tokens, self.room),
            stop_token_ids=self._request.stop_token_ids,
            label=self._request.label,
        )
        self._answer = asyncio.get_running_loop().create_future()
        self._waits()
        try:
            completion = await self._answer
        finally:
            self.asked = self._answer = None
        assert completion.finish_reason is not None
        for span in completion.weight_spans:
            # Inserted tokens before the turn count as the turn's.
            start = self._spans[-1].end if self._spans else 0
            if self._spans and self._spans[-1].version == span.version:
                start = self._spans.pop().start
            self._spans.append(WeightSpan(version=span.version, start=start, end=len(self._tokens) + span.end))
        self._tokens += completion.token_ids
        self._logprobs += completion.logprobs
        self._num_turns += 1
        self._finish_reason = completion.finish_reason
        return Turn(
            text=self._renderer.response_text(completion.token_ids),
            token_ids=completion.token_ids,
            logprobs=completion.logprobs,
            weight_version=completion.weight_spans[-1].version,
            finish_reason=completion.finish_reason,
        )

    def append(self, text: str) -> None:
        """Appends the tokens of a text that the policy did not generate, as far as there is room.

        Raises:
            ValueError: the model has no row for a token.
        """
        self.append_ids(self._renderer.text_ids(text))

    def append_message(self, role: str, content: str) -> None:
        """Ends the assistant's turn, adds a message of another role, and opens the assistant's next turn.

        Raises:
            RuntimeError, ValueError: see `append_messages`.
        """
        self.append_messages([(role, content)])

    def append_messages(self, messages: Sequence[tuple[str, str]]) -> None:
        """Ends the assistant's turn, adds messages of other roles, and opens the assistant's next turn.

        The tokens are those that the chat template has between two turns, as in supervised fine-tuning. messages: role
        and content of each.

        Raises:
            RuntimeError: the last token is not the policy's, so there is no turn to end.
            ValueError: the chat template refuses the messages, or changes earlier turns.
        """
        if not self._tokens or (self._inserted and self._inserted[-1][1] == len(self._tokens)):
            raise RuntimeError(
                "append_message() ends a turn of the policy, and its last token is not the policy's; await generate() "
                "first, or pass several messages to append_messages()"
            )
        ended = self._tokens[-1] == self._renderer.stop_token_id  # a response may have other tokens that end a turn
        self.append_ids([*([] if ended else [self._renderer.stop_token_id]), *self._renderer.between_turns(messages)])

    def append_ids(self, token_ids: Sequence[int]) -> None:
        """Appends token ids that the policy did not generate, as far as there is room.

        Raises:
            ValueError: the model has no row for one of them.
        """
        self._renderer.check_rows(token_ids, "append_ids()")
        start = len(self._tokens)
        self._tokens += list(token_ids)[: self.room]
        if len(self._tokens) > start:
            self._finish_reason = FinishReason.LENGTH
            if self._inserted and self._inserted[-1][1] == start:
                start = self._inserted.pop()[0]
            self._inserted.append((start, len(self._tokens)))

    def answer(self, completion: Completion) -> None:
        """Gives the loop the tokens that it waits for."""
        assert self._answer is not None
        self.asked = None
        self._answer.set_result(completion)

    def completion(self) -> Completion:
        """Returns the whole response. It has stopped if its last token is a stop token that the policy generated.

        Raises:
            ValueError: the policy generated nothing.
        """
        if not self._logprobs:
            raise ValueError("the loop ended without a token of the policy; await conversation.generate()")
        return Completion(
            token_ids=tuple(self._tokens),
            logprobs=tuple(self._logprobs),
            finish_reason=self._finish_reason,
            weight_spans=(*self._spans[:-1], replace(self._spans[-1], end=len(self._tokens))),
            inserted_spans=tuple(self._inserted),
        )


class LoopGenerator:
    """A ResponseGenerator whose responses are written by a loop of the user's own, on any engine.

    All loops of a part run at the same time. Once each of them waits for tokens or has ended, the engine generates what
    they wait for. A part is a unit where the engine generates batch by batch, and all units where servers generate.
    The leading process of each model replica runs the loops.
    """

    def __init__(
        self,
        engine: ResponseGenerator,
        loop: Loop,
        renderer: PromptRenderer,
        groups: ParallelGroups,
        stop: StopRequest,
        *,
        name: str,
        seconds: float,
        all_units_at_once: bool,
    ):
        """Makes a generator. name: the loop, for messages. seconds: see rollout.generation.seconds."""
        self._engine, self._loop, self._renderer, self._groups, self._stop = engine, loop, renderer, groups, stop
        self._name, self._seconds, self._all_units_at_once = name, seconds, all_units_at_once

    @property
    def weight_version(self) -> int:
        return self._engine.weight_version

    def units(self, requests: Sequence[GenerationRequest]) -> list[list[int]]:
        """See RolloutEngine."""
        return self._engine.units(requests)

    def generate(
        self,
        units: Sequence[Sequence[GenerationRequest]],
        sampling: SamplingConfig,
        is_enough: Callable[[], bool] | None = None,
    ) -> Iterator[tuple[int, list[Completion]]]:
        """Yields finished units; see RolloutEngine. Generation is never broken off. A request to stop ends it.

        Raises:
            ValueError: a loop raised, or ended without a token of the policy, or was busy for too long; with its
                prompt. On every rank of the replica.
        """
        assert is_enough is None
        indices = range(len(units))
        parts = [list(indices)] if self._all_units_at_once else [[index] for index in indices]
        for part in parts:
            yield from self._generate_part({index: units[index] for index in part}, sampling)

    def _generate_part(
        self, units: Mapping[int, Sequence[GenerationRequest]], sampling: SamplingConfig
    ) -> Iterator[tuple[int, list[Completion]]]:
        loops = None
        if self._groups.leads_replica:
            loops = _Loops(self._loop, units, self._renderer, name=self._name, seconds=self._seconds)
        try:
            while not self._groups.any_of_replica(self._stop.is_made):
                own = None if loops is None else loops.advance()
                # Servers have the requests of the leading process alone.
                light = None if own is None else own.without_tokens(requests_too=self._all_units_at_once)
                outcome = self._groups.from_replica_leader(light)
                if own is not None:
                    outcome = own
                if outcome.error is not None:
                    raise ValueError(outcome.error)
                yield from outcome.finished
                if outcome.is_busy:
                    continue
                if not outcome.asked:
                    return
                indices = list(outcome.asked)
                wanted = [list(outcome.asked[index].values()) for index in indices]
                num_answered = 0
                for position, completions in self._engine.generate(wanted, sampling):
                    num_answered += 1
                    if loops is not None:
                        loops.answer(indices[position], outcome.asked[indices[position]], completions)
                if num_answered < len(indices):  # the engine was stopped
                    return
        finally:
            if loops is not None:
                loops.close()


@dataclass
class _Outcome:
    """State of the loops of a part."""

    finished: list[tuple[int, list[Completion]]] = field(default_factory=list)
    asked: dict[int, dict[int, GenerationRequest]] = field(default_factory=dict)
    """Requests by unit and by place in the unit, once no loop is busy."""
    is_busy: bool = False
    """Whether a loop is busy, so that nothing is generated yet."""
    error: str | None = None

    def without_tokens(self, *, requests_too: bool) -> _Outcome:
        """Returns the outcome for the ranks that only have to take the same path as the leading process."""
        finished = [
            (index, [replace(one, token_ids=(), logprobs=(), inserted_spans=()) for one in unit])
            for index, unit in self.finished
        ]
        asked = self.asked
        if requests_too:
            asked = {
                index: {place: replace(request, prompt_ids=()) for place, request in unit.items()}
                for index, unit in self.asked.items()
            }
        return replace(self, finished=finished, asked=asked)


_At = tuple[int, int]
"""Unit of a response, and its place in the unit."""


class _Loops:
    """The loops of the responses of some units, in an event loop of their own."""

    def __init__(
        self,
        function: Loop,
        units: Mapping[int, Sequence[GenerationRequest]],
        renderer: PromptRenderer,
        *,
        name: str,
        seconds: float,
    ):
        self._runner = asyncio.Runner()
        self._name, self._seconds = name, seconds
        self._function = function
        self._units = dict(units)
        self._renderer = renderer
        self._conversations: dict[_At, Conversation] = {}
        self._tasks: dict[_At, asyncio.Task[None]] = {}
        self._busy: set[_At] = set()
        """Loops that neither wait for tokens nor have ended."""
        self._quiet = asyncio.Event()
        """Set where no loop is busy."""
        self._busy_until: float | None = None

    def advance(self) -> _Outcome:
        """Runs the loops until each waits for the policy's tokens or has ended, or for a heartbeat."""
        try:
            return self._runner.run(self._advance())
        except Exception as error:  # whatever the user's function raises
            logger.error("%s failed", self._name, exc_info=error)
            return _Outcome(error=f"{self._name} {error}")

    async def _advance(self) -> _Outcome:
        if not self._tasks:
            for index, unit in self._units.items():
                for place, request in enumerate(unit):
                    self._begin((index, place), request)
        if not await self._wait():
            return _Outcome(is_busy=True)
        for at, task in self._tasks.items():
            if task.done():
                self._check(task, at)
            elif self._conversations[at].asked is None:  # it went on after its wait was cancelled
                self._busy.add(at)
                self._quiet.clear()
        if self._busy:
            return _Outcome(is_busy=True)
        outcome = _Outcome()
        for (index, place), conversation in self._conversations.items():
            if conversation.asked is not None:
                outcome.asked.setdefault(index, {})[place] = conversation.asked
        for index in sorted(self._units.keys() - outcome.asked.keys()):
            places = [(index, place) for place in range(len(self._units.pop(index)))]
            outcome.finished.append((index, [self._conversations.pop(at).completion() for at in places]))
            for at in places:
                del self._tasks[at]
        return outcome

    def _begin(self, at: _At, request: GenerationRequest) -> None:
        conversation = Conversation(request, self._renderer, lambda: self._rests(at))
        self._conversations[at] = conversation
        self._busy.add(at)
        self._tasks[at] = asyncio.create_task(self._run(conversation, request))
        self._tasks[at].add_done_callback(lambda _: self._rests(at))

    async def _wait(self) -> bool:
        """Returns whether no loop is busy, after a heartbeat at most.

        Raises:
            ValueError: loops have been busy for too long.
        """
        now = time.monotonic()
        self._busy_until = self._busy_until or now + self._seconds
        try:
            async with asyncio.timeout(max(min(_HEARTBEAT_SECONDS, self._busy_until - now), 0.0)):
                await self._quiet.wait()
        except TimeoutError:
            if self._busy and time.monotonic() >= self._busy_until:
                raise ValueError(
                    f"was busy for rollout.generation.seconds = {self._seconds:g} without asking for tokens, at the "
                    f"question {self._question(min(self._busy))!r}; set limits of time to what it waits for"
                ) from None
            return not self._busy
        self._busy_until = None
        return True

    def _check(self, task: asyncio.Task[None], at: _At) -> None:
        """Raises ValueError where a loop that has ended failed."""
        if task.cancelled():
            raise ValueError(f"was cancelled (at the question {self._question(at)!r})")
        if (error := task.exception()) is not None:
            raise ValueError(
                f"raised {type(error).__name__}: {error} (at the question {self._question(at)!r})"
            ) from error

    def _question(self, at: _At) -> str:
        return self._units[at[0]][at[1]].question[:80]

    async def _run(self, conversation: Conversation, request: GenerationRequest) -> None:
        await self._function(conversation=conversation, question=request.question, prompt_ids=request.prompt_ids)
        conversation.completion()

    def _rests(self, at: _At) -> None:
        """Notes that a loop waits for tokens or has ended."""
        self._busy.discard(at)
        if not self._busy:
            self._quiet.set()

    def answer(self, index: int, asked: Mapping[int, GenerationRequest], completions: Sequence[Completion]) -> None:
        """Gives the loops of a unit the tokens that they wait for."""
        for place, completion in zip(asked, completions, strict=True):
            self._busy.add((index, place))
            self._quiet.clear()
            self._conversations[index, place].answer(completion)

    def close(self) -> None:
        """Cancels the loops that have not ended."""
        self._runner.close()
