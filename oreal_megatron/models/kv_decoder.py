"""Decoding with a KV cache on the trainer's own model, in any tensor and pipeline layout.

Shapes: B sequences, S prompt tokens after left padding, V vocabulary (without padding rows).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from oreal_megatron.distributed.cpu_backend import device
from oreal_megatron.distributed.groups import ParallelGroups
from oreal_megatron.models.virtual_stages import ModelChunks, chunks_of


class CachedDecoder:
    """A batch of sequences with their KV cache.

    Prompts are padded on the left, so that all sequences share cache slots. Rotary embeddings depend on differences of
    slots only, which the padding does not change.
    """

    def __init__(self, model: GPTModel | ModelChunks, groups: ParallelGroups, vocab_size: int):
        self.chunks = chunks_of(model)
        self.groups = groups
        self.vocab_size = vocab_size
        self._split_by_sequence = _sequence_parallel_switches(self.chunks)

    @torch.no_grad()
    def prefill(self, prompts: list[tuple[int, ...]], max_new_tokens: int) -> Tensor:
        """Fills the cache with the prompts. Returns the fp32 logits [B, V] of the next tokens on every rank."""
        for chunk in self.chunks:
            chunk.eval()
        longest = max(map(len, prompts))
        self.padding = torch.tensor([longest - len(prompt) for prompt in prompts], device=device())
        tokens = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device())
        self.context = StaticInferenceContext(len(prompts), longest + max_new_tokens)
        self.slots = torch.arange(longest + max_new_tokens, device=device())
        # Kept on the host: reading it from the device at each token would synchronize.
        self._is_padded = any(len(prompt) < longest for prompt in prompts)
        if not self._is_padded:
            return self._forward(tokens, None)
        real = self.slots[:longest] >= self.padding[:, None]
        square = torch.ones(longest, longest, dtype=torch.bool, device=device())
        # A padding position attends to itself, since a softmax over no position is NaN.
        mask = real[:, None, :] & square.tril() | square.tril().triu()
        return self._forward(tokens, mask[:, None])

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Appends `tokens`, int64 [B], to the sequences. Returns the fp32 logits [B, V] of the next tokens."""
        self.context.enable_decode_mode()
        length = self.context.sequence_len_offset + 1
        mask = (self.slots[:length] >= self.padding[:, None])[:, None, None] if self._is_padded else None
        return self._forward(tokens[:, None], mask)

    def keep(self, rows: Tensor) -> None:
        """Replaces the batch by its rows `rows`, int64 indices, in this order; a row may occur several times."""
        self.padding = self.padding[rows]
        self._is_padded = bool(self.padding.any())
        cache = self.context.key_value_memory_dict
        for layer, memories in cache.items():
            cache[layer] = tuple(memory.index_select(1, rows) for memory in memories)
        self.context.max_batch_size = len(rows)

    def _forward(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """Runs one forward pass through all stages and model chunks, and broadcasts the logits to all stages."""
        groups, pipeline = self.groups, self.groups.collection.pp
        previous, following = ((groups.pipeline_rank + way) % groups.pipeline_size for way in (-1, 1))
        start = self.context.sequence_len_offset
        positions = self.slots[start : start + tokens.size(1)].expand_as(tokens)
        output = tokens
        with self._whole_sequences():
            for chunk in self.chunks:
                if not chunk.pre_process:
                    shape = (tokens.size(1), tokens.size(0), chunk.config.hidden_size)
                    hidden = torch.empty(shape, dtype=chunk.config.params_dtype, device=device())
                    dist.recv(hidden, group=pipeline, group_src=previous)
                    chunk.set_input_tensor(hidden)
                output = chunk(tokens, positions, mask, inference_context=self.context, runtime_gather_output=True)
                if not chunk.post_process:
                    dist.send(output.contiguous(), group=pipeline, group_dst=following)
        self.context.sequence_len_offset += tokens.size(1)
        if groups.is_last_stage:
            logits = output[:, -1, : self.vocab_size].float().contiguous()
        else:
            logits = torch.empty(tokens.size(0), self.vocab_size, device=device())
        if groups.pipeline_size > 1:
            dist.broadcast(logits, group=pipeline, group_src=groups.pipeline_size - 1)
        return logits

    @contextlib.contextmanager
    def _whole_sequences(self) -> Iterator[None]:
        """Switches sequence parallelism off in the block: a step of one token does not split over ranks.

        Megatron-Core's own switch caches models by their address and never removes them.
        """
        for part, name in self._split_by_sequence:
            setattr(part, name, False)
        try:
            yield
        finally:
            for part, name in self._split_by_sequence:
                setattr(part, name, True)


def _sequence_parallel_switches(chunks: list[GPTModel]) -> list[tuple[Any, str]]:
    """Returns every (object, attribute) that is true under sequence parallelism."""
    names = ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings")
    if not chunks[0].config.sequence_parallel:
        return []
    parts = [chunks[0].config, *(module for chunk in chunks for module in chunk.modules())]
    return [(part, name) for part in parts for name in names if getattr(part, name, False) is True]
