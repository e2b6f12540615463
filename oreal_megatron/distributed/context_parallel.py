"""Context parallelism: splits a packed row over ranks, and gathers it again.

Every sequence, padded to a multiple of 2C tokens for C ranks, is cut into 2C pieces; rank c holds pieces c and
2C - 1 - c of each. Under a causal mask all ranks then do the same work. Megatron-Core's rotary embedding of packed
rows and Transformer Engine's attention expect this split.

Shapes: N sequences in a packed row of T tokens.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from oreal_megatron.distributed.groups import ParallelGroups


def tokens_of_rank(bounds: Sequence[int], size: int, rank: int) -> Tensor:
    """Returns the positions in the row of the tokens that `rank` holds, in the rank's order: int64 [T / size].

    Args:
        bounds: [N + 1] starts of the row's sequences and its end; every length is a multiple of 2 * size.
        size: number of context ranks.
        rank: context rank.
    """
    return _tokens_of_rank(tuple(bounds), size, rank)


def whole_row(bounds: Sequence[int], size: int) -> Tensor:
    """Returns for every position of the row its index in the ranks' tokens, concatenated by rank: int64 [T]."""
    return _whole_row(tuple(bounds), size)


# Cached: every layer of the forward and the backward pass needs the result for the same few rows.
@functools.lru_cache(maxsize=32)
def _tokens_of_rank(bounds: tuple[int, ...], size: int, rank: int) -> Tensor:
    pieces = []
    for start, end in itertools.pairwise(bounds):
        length = (end - start) // (2 * size)
        for index in (rank, 2 * size - 1 - rank):
            pieces.append(torch.arange(start + index * length, start + (index + 1) * length))
    return torch.cat(pieces)


@functools.lru_cache(maxsize=32)
def _whole_row(bounds: tuple[int, ...], size: int) -> Tensor:
    return torch.cat([_tokens_of_rank(bounds, size, rank) for rank in range(size)]).argsort()


def part_of_row(row: Tensor, bounds: Sequence[int], groups: ParallelGroups, dim: int) -> Tensor:
    """Selects this rank's tokens of `row`, all of them without context parallelism."""
    if groups.context_size == 1:
        return row
    return row.index_select(dim, tokens_of_rank(bounds, groups.context_size, groups.context_rank).to(row.device))


def gathered_row(part: Tensor, bounds: Sequence[int], groups: ParallelGroups, dim: int) -> Tensor:
    """Gathers the whole row on every rank: the inverse of `part_of_row`.

    Every rank computes the same with the result, so the gradient is sliced to the rank's own tokens, not summed.
    """
    if groups.context_size == 1:
        return part
    gathered = gather_from_sequence_parallel_region(
        part.transpose(0, dim).contiguous(), tensor_parallel_output_grad=False, group=groups.collection.cp
    )
    order = whole_row(bounds, groups.context_size).to(part.device)
    return gathered.index_select(0, order).transpose(0, dim)
