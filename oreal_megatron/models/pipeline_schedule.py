"""Runs Megatron-Core's pipeline schedule over packed micro-batches with the caller's loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from oreal_megatron.data.packing import TokenBatch
from oreal_megatron.distributed.context_parallel import gathered_row, part_of_row
from oreal_megatron.distributed.groups import ParallelGroups
from oreal_megatron.models.packed_row import packed_row
from oreal_megatron.models.virtual_stages import chunks_of

LossFunction = Callable[[Tensor, TokenBatch], tuple[Tensor, Any]]
"""Function (model output, micro-batch) -> (loss already divided by global counts, any further result)."""


def forward_backward(
    chunks: Sequence[DistributedDataParallel], batches: Sequence[TokenBatch], loss: LossFunction, groups: ParallelGroups
) -> list[Any]:
    """Computes gradients of the summed losses, reduced over data-parallel ranks.

    Returns:
        The further result of `loss` for every micro-batch, on every stage.
    """
    for chunk in chunks:
        chunk.zero_grad_buffer()
        chunk.train()
    return _run(chunks, batches, loss, groups, forward_only=False)


@torch.no_grad()
def score(
    model: torch.nn.Module,
    batches: Sequence[TokenBatch],
    read: Callable[[Tensor, TokenBatch], Any],
    groups: ParallelGroups,
) -> list[Any]:
    """Returns `read(model output, micro-batch)` for every micro-batch on every stage, without gradients."""
    model.eval()

    def as_loss(output: Tensor, batch: TokenBatch) -> tuple[Tensor, Any]:
        return output.new_zeros(()), read(output, batch)

    return _run(chunks_of(model), batches, as_loss, groups, forward_only=True)


def _run(
    chunks: Sequence[torch.nn.Module],
    batches: Sequence[TokenBatch],
    loss: LossFunction,
    groups: ParallelGroups,
    *,
    forward_only: bool,
) -> list[Any]:
    interleaved = len(chunks) > 1
    results = get_forward_backward_func()(
        forward_step_func=partial(_forward_step, loss, groups),
        data_iterator=[iter(batches) for _ in chunks] if interleaved else iter(batches),
        model=list(chunks) if interleaved else chunks[0],
        num_microbatches=len(batches),
        # Lengths vary: with variable_seq_lengths the schedule sends shapes, and these two have no effect.
        seq_length=batches[0].tokens.size(1),
        micro_batch_size=1,
        forward_only=forward_only,
    )
    return groups.from_last_stage(results if groups.is_last_stage else None)


def _forward_step(
    loss: LossFunction, groups: ParallelGroups, batches: Iterator[TokenBatch], model: torch.nn.Module
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, Any]]]:
    batch = next(batches)
    bounds = batch.cu_seqlens.tolist() if groups.context_size > 1 else []
    tokens, positions, labels = (
        part_of_row(row, bounds, groups, dim=1) for row in (batch.tokens, batch.positions, batch.labels)
    )
    output = model(tokens, positions, None, labels=labels, packed_seq_params=packed_row(batch, positions[0]))

    def megatron_loss(output: Tensor) -> tuple[Tensor, Tensor, Any]:
        # The loss reads whole sequences. They are a few numbers a token, so every context rank gathers them.
        whole = gathered_row(output, bounds, groups, dim=output.dim() - 2)
        value, result = loss(whole, batch)
        return value, torch.ones((), dtype=torch.int, device=value.device), result

    return output, megatron_loss


def sum_gradients(model: list[torch.nn.Module], num_tokens: Tensor | None = None, **options: Any) -> None:
    """Calls Megatron-Core's finalize_model_grads without its division: losses are already divided by global counts."""
    finalize_model_grads(model, None, **options)
