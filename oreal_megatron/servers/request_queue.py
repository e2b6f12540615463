"""A queue of generation requests: which are pending, which are at a server, and which have their completion."""

from __future__ import annotations

import asyncio
import bisect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from oreal_megatron.config import SamplingConfig
from oreal_megatron.servers.client import Generated, ServerClient
from oreal_megatron.types import Completion, FinishReason, GenerationRequest, WeightSpan

# A request that has lost contact to this many servers is probably the reason.
_MAX_ATTEMPTS = 4

NOTHING = Completion(token_ids=(), logprobs=(), finish_reason=None, weight_spans=())
"""A response before its first token."""


class NoServerError(ConnectionError):
    """No server is left that could answer."""

    @classmethod
    def of(cls, failures: Mapping[str, str | None], num_servers: int) -> NoServerError:
        """Returns the error that names every failed server. failures: reasons by URL."""
        reasons = "\n".join(f"  {url}: {reason}" for url, reason in failures.items())
        return cls(f"{len(failures)} of {num_servers} rollout servers cannot be used:\n{reasons}")


class RequestQueue:
    """The requests of one call; calls `completed` with index and completion of every request, once."""

    def __init__(
        self,
        requests: Sequence[GenerationRequest],
        sampling: SamplingConfig,
        completed: Callable[[int, Completion], None],
        *,
        is_open: bool = False,
    ):
        """is_open: whether `add` may follow; the queue then finishes after `end` only."""
        self.requests: list[GenerationRequest] = []
        self.sampling = sampling
        self.pending: dict[tuple[int, ...], list[int]] = {}
        """Requests that are at no server, by prompt and in the order of their indices; a prompt without pending
        requests has no entry."""
        self.at_servers: dict[str, ServerClient] = {}
        """Clients of the servers that work on a request, by request id."""
        self.finished = asyncio.Event()
        self.is_ending = False
        """Whether unfinished requests complete with the tokens that they have."""
        self.is_open = is_open
        self._completed = completed
        self._is_done: list[bool] = []
        self._attempts: list[int] = []
        self._num_left = 0
        self._num_answers = self._num_new_tokens = 0
        self.add(requests)

    def add(self, requests: Sequence[GenerationRequest]) -> None:
        """Adds requests behind those that there are."""
        start = len(self.requests)
        self.requests += requests
        self._is_done += [False] * len(requests)
        self._attempts += [0] * len(requests)
        self._num_left += len(requests)
        for index, request in enumerate(requests, start):
            if self.is_ending or (request.partial is not None and request.partial.finish_reason is not None):
                self._complete_partial(index)
            else:
                self._make_pending(index)
        self._finish_if_done()

    def complete(self, index: int, completion: Completion) -> None:
        assert not self._is_done[index]
        self._is_done[index] = True
        self._completed(index, completion)
        self._num_left -= 1
        self._finish_if_done()

    def _finish_if_done(self) -> None:
        if self._num_left == 0 and (self.is_ending or not self.is_open):
            self.finished.set()

    def _make_pending(self, index: int) -> None:
        bisect.insort(self.pending.setdefault(self.requests[index].prompt_ids, []), index)

    def take(self, prompt_ids: tuple[int, ...]) -> int:
        """Removes and returns the next pending request of a prompt."""
        waiting = self.pending[prompt_ids]
        index = waiting.pop(0)
        if not waiting:
            del self.pending[prompt_ids]
        return index

    def untake(self, index: int) -> None:
        """Makes a request pending again that was taken and not sent."""
        if self.is_ending:
            self._complete_partial(index)
        else:
            self._make_pending(index)

    def put_back(self, index: int, error: Exception) -> None:
        """Makes a request pending again that was sent. Raises NoServerError if it keeps losing servers."""
        if self.is_ending:
            self._complete_partial(index)
            return
        self._attempts[index] += 1
        if self._attempts[index] >= _MAX_ATTEMPTS:
            raise NoServerError(
                f"a prompt of {len(self.requests[index].prompt_ids)} tokens was lost {_MAX_ATTEMPTS} times "
                f"(token ids {list(self.requests[index].prompt_ids[:20])}...), the last time by: {error}"
            ) from error
        self._make_pending(index)

    def end(self) -> None:
        """Completes pending requests with the tokens that they have; requests at servers complete once they answer."""
        self.is_ending = True
        for index in [index for waiting in self.pending.values() for index in waiting]:
            self._complete_partial(index)
        self.pending.clear()
        self._finish_if_done()

    def _complete_partial(self, index: int) -> None:
        self.complete(index, self.requests[index].partial or NOTHING)

    def expected_tokens(self, index: int) -> float:
        """Estimates the tokens of a request at a server: what it reads, and the mean response.

        The mean is that of the prompt where it is known, or else that of the answers so far.
        """
        limit = self._max_new_tokens(index)
        request = self.requests[index]
        mean = request.expected_tokens
        if mean is None:
            mean = self._num_new_tokens / self._num_answers if self._num_answers else limit / 2
        return len(request.prompt_ids) + len((request.partial or NOTHING).token_ids) + min(limit, mean)

    def input_ids(self, index: int) -> tuple[int, ...]:
        """Returns the token ids that the server reads: the prompt and the partial response."""
        request = self.requests[index]
        return request.prompt_ids + (request.partial or NOTHING).token_ids

    def _max_new_tokens(self, index: int) -> int:
        request = self.requests[index]
        return request.max_new_tokens - len((request.partial or NOTHING).token_ids)

    def options(self, index: int, stop_token_id: int) -> dict[str, Any]:
        """Returns SGLang's sampling parameters of a request."""
        request = self.requests[index]
        return {
            "temperature": self.sampling.temperature,
            "top_p": self.sampling.top_p,
            # Explicit, because a generation_config.json may change the server's defaults.
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "max_new_tokens": self._max_new_tokens(index),
            "stop_token_ids": self._stop_token_ids(index, stop_token_id),
            "sampling_seed": request.seed,
        }

    def _stop_token_ids(self, index: int, stop_token_id: int) -> list[int]:
        return [stop_token_id, *self.requests[index].stop_token_ids]

    def is_stopped(self, index: int, token_ids: Sequence[int], stop_token_id: int) -> bool:
        """Returns whether the last of a response's tokens is one that ends it. stop_token_id: the policy's."""
        return bool(token_ids) and token_ids[-1] in self._stop_token_ids(index, stop_token_id)

    def completion(
        self, index: int, generated: Generated, *, versions: Sequence[tuple[int, int]], stop_token_id: int
    ) -> Completion:
        """Returns the partial response extended by `generated`.

        versions: spans of the tokens of `generated` by the weights that count as theirs: the version, and the end.
        """
        request = self.requests[index]
        self._num_answers += 1
        self._num_new_tokens += len(generated.token_ids)
        partial = request.partial or NOTHING
        tokens = partial.token_ids + generated.token_ids
        if self.is_stopped(index, tokens, stop_token_id):  # an abort may come with the last token
            reason: FinishReason | None = FinishReason.STOP
        elif len(tokens) >= request.max_new_tokens or generated.finish["type"] == "length":
            reason = FinishReason.LENGTH
        else:
            reason = None
        spans = partial.weight_spans
        for version, end in versions:
            spans = _extended(spans, version, len(partial.token_ids) + end)
        return Completion(
            token_ids=tokens, logprobs=partial.logprobs + generated.logprobs, finish_reason=reason, weight_spans=spans
        )


def _extended(spans: tuple[WeightSpan, ...], version: int, end: int) -> tuple[WeightSpan, ...]:
    start = spans[-1].end if spans else 0
    if start == end:
        return spans
    if spans and spans[-1].version == version:
        spans, start = spans[:-1], spans[-1].start
    return (*spans, WeightSpan(version=version, start=start, end=end))
