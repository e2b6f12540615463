"""Embedded generation on the trainer's own policy: without a server and without a copy of the weights.

Requests are cut into batches of fixed size and membership; a batch is a unit. A response depends on its own seed and,
through rounding alone, on its batch's membership, never on the number of ranks.
Shapes: B sequences still running in a batch, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from oreal_megatron.config import SamplingConfig
from oreal_megatron.models.kv_decoder import CachedDecoder
from oreal_megatron.types import Completion, FinishReason, GenerationRequest, WeightSpan

# Finished sequences leave the batch once fewer than this share is running: a removal copies the others' KV cache.
_COMPACT_BELOW = 0.75
# Number of most likely tokens that are searched for the nucleus before the whole vocabulary is sorted.
_NUCLEUS = 256


class EmbeddedEngine:
    """A RolloutEngine that generates with the policy that is being trained."""

    def __init__(
        self,
        new_decoder: Callable[[], CachedDecoder],
        *,
        stop_token_id: int,
        batch_size: int,
        text_of: Callable[[Sequence[int]], str] = str,
    ):
        """Makes an engine. text_of: returns the text of token ids, for messages."""
        self._new_decoder = new_decoder
        self._stop_token_id = stop_token_id
        self._batch_size = batch_size
        self._text_of = text_of
        self.weight_version = 0

    def units(self, requests: Sequence[GenerationRequest]) -> list[list[int]]:
        """Cuts requests into batches of prompts of similar length, which need little padding; see RolloutEngine."""
        order = sorted(range(len(requests)), key=lambda index: len(requests[index].prompt_ids))
        return [order[start : start + self._batch_size] for start in range(0, len(order), self._batch_size)]

    def generate(
        self,
        units: Sequence[Sequence[GenerationRequest]],
        sampling: SamplingConfig,
        is_enough: Callable[[], bool] | None = None,
    ) -> Iterator[tuple[int, list[Completion]]]:
        """Yields finished batches; see RolloutEngine. A batch decodes as a whole, so generation is never broken off."""
        assert is_enough is None and not any(request.partial for unit in units for request in unit)
        for index, requests in enumerate(units):
            yield index, self._generate_batch(requests, sampling)

    def publish(self, weight_version: int) -> dict[str, float]:
        self.weight_version = weight_version
        return {}

    def generation_context(
        self, policy_on_device: Callable[[], AbstractContextManager[None]]
    ) -> AbstractContextManager[None]:
        """Keeps the policy on the devices; see RolloutEngine."""
        return policy_on_device()

    def offload(self) -> None:
        """Does nothing: no memory is held between calls."""

    def close(self) -> None:
        pass

    def _generate_batch(self, requests: Sequence[GenerationRequest], sampling: SamplingConfig) -> list[Completion]:
        limit = max(request.max_new_tokens for request in requests)
        running = _Running(
            [_uniforms(request) for request in requests],
            [request.max_new_tokens for request in requests],
            [{self._stop_token_id, *request.stop_token_ids} for request in requests],
        )
        decoder = self._new_decoder()
        # The samples of a group share their prompt: it is read once, and its cache is copied for each.
        prompts = list(dict.fromkeys(request.prompt_ids for request in requests))
        row_of = {prompt: row for row, prompt in enumerate(prompts)}
        logits = decoder.prefill(prompts, limit)
        if len(prompts) < len(requests):
            rows = torch.tensor([row_of[request.prompt_ids] for request in requests], device=logits.device)
            decoder.keep(rows)
            logits = logits[rows]
        for index in range(limit):
            chosen, logprobs = sample(logits, running.uniforms(index, logits.device), sampling)
            if (broken := running.append(chosen, logprobs)) is not None:
                raise FloatingPointError(
                    f"the policy's logits are not numbers at token {index} of the response to the prompt "
                    f"{self._text_of(requests[broken].prompt_ids)!r}: check the weights of model.path for NaN and "
                    "infinity, or lower the learning rate if the policy has been updated"
                )
            if not running.alive.any():
                break
            if running.alive.mean() < _COMPACT_BELOW:
                rows = torch.from_numpy(np.flatnonzero(running.alive)).to(logits.device)
                decoder.keep(rows)
                chosen = chosen[rows]
                running.compact()
            logits = decoder.step(chosen)
        return [
            Completion(
                token_ids=tuple(tokens),
                logprobs=tuple(logprobs),
                finish_reason=FinishReason.STOP if tokens[-1] in stops else FinishReason.LENGTH,
                weight_spans=(WeightSpan(version=self.weight_version, start=0, end=len(tokens)),),
            )
            for tokens, logprobs, stops in zip(running.tokens, running.logprobs, running.stops, strict=True)
        ]


@dataclass
class _Running:
    """Sequences of a batch: their tokens so far, and the decoder's rows of the running sequences."""

    noise: list[np.ndarray]
    limits: list[int]
    stops: list[set[int]]
    """Token ids that end each sequence."""
    tokens: list[list[int]] = field(init=False)
    logprobs: list[list[float]] = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = [[] for _ in self.noise]
        self.logprobs = [[] for _ in self.noise]
        self.rows = np.arange(len(self.noise))
        self.alive = np.ones(len(self.noise), dtype=bool)

    def uniforms(self, index: int, device: torch.device) -> Tensor:
        """Returns fp32 [B]: the number in [0, 1) that decides token `index` of each running sequence."""
        values = [self.noise[row][min(index, self.limits[row] - 1)] for row in self.rows]
        return torch.tensor(values, dtype=torch.float32, device=device)

    def append(self, chosen: Tensor, logprobs: Tensor) -> int | None:
        """Appends a token to every running sequence. Returns the first sequence whose log-probability is NaN."""
        for position, (row, token, logprob) in enumerate(
            zip(self.rows, chosen.tolist(), logprobs.tolist(), strict=True)
        ):
            if self.alive[position]:
                if math.isnan(logprob):
                    return int(row)
                self.tokens[row].append(token)
                self.logprobs[row].append(logprob)
                self.alive[position] = token not in self.stops[row] and len(self.tokens[row]) < self.limits[row]
        return None

    def compact(self) -> None:
        self.rows = self.rows[self.alive]
        self.alive = np.ones(len(self.rows), dtype=bool)


def _uniforms(request: GenerationRequest) -> np.ndarray:
    return np.random.Generator(np.random.Philox(request.seed)).random(request.max_new_tokens, dtype=np.float32)


def sample(logits_BV: Tensor, uniform_B: Tensor, sampling: SamplingConfig) -> tuple[Tensor, Tensor]:
    """Draws one token a row by inverting the cumulative distribution of its top-p nucleus.

    The nucleus is the smallest set of most likely tokens whose probability reaches top_p.
    logits_BV: fp32 [B, V]. uniform_B: fp32 [B] in [0, 1).
    Returns token ids int64 [B], and their log softmax(logits / temperature), fp32 [B]; of plain logits when greedy.
    Where a row's logits are not numbers, its log-probability is NaN.
    """
    if sampling.temperature == 0:
        chosen = logits_BV.argmax(-1)
        return chosen, logits_BV.log_softmax(-1).gather(-1, chosen[:, None]).squeeze(-1)
    logprobs_BV = (logits_BV / sampling.temperature).log_softmax(-1)
    ordered, order = _most_likely(logprobs_BV.exp(), sampling.top_p)
    cumulative = ordered.cumsum(-1)
    kept = cumulative - ordered < sampling.top_p
    mass = ordered.where(kept, 0.0).sum(-1, keepdim=True)
    # Where rounding leaves the target above the cumulative sum, the last kept token is drawn. NaN keeps none.
    rank = (cumulative <= uniform_B[:, None] * mass).sum(-1).minimum((kept.sum(-1) - 1).clamp_min(0))
    chosen = order.gather(-1, rank[:, None]).squeeze(-1)
    return chosen, logprobs_BV.gather(-1, chosen[:, None]).squeeze(-1)


def _most_likely(probabilities_BV: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Returns probabilities and their token ids, [B, N], in descending order: at least every row's nucleus.

    A nucleus nearly always has few tokens: selecting them costs a twentieth of sorting a vocabulary of 50,000.
    With top_p = 1 it is the whole vocabulary, in the order of token ids.
    """
    if top_p == 1.0:
        return probabilities_BV, torch.arange(probabilities_BV.size(-1), device=probabilities_BV.device).expand_as(
            probabilities_BV
        )
    if probabilities_BV.size(-1) > 4 * _NUCLEUS:
        ordered, order = probabilities_BV.topk(_NUCLEUS, dim=-1)
        if bool((ordered.sum(-1) >= top_p).all()):
            return ordered, order
    return probabilities_BV.sort(dim=-1, descending=True, stable=True)
