"""Context parallelism: a packed row split over ranks, everybody's tokens once, equal causal work, and the way back."""

from __future__ import annotations

import pytest
import torch

from oreal_megatron.distributed.context_parallel import tokens_of_rank, whole_row

BOUNDS = [0, 16, 48, 64]


def test_two_ranks_share_a_row_by_hand():
    assert tokens_of_rank([0, 4, 12], 2, 0).tolist() == [0, 3, 4, 5, 10, 11]
    assert tokens_of_rank([0, 4, 12], 2, 1).tolist() == [1, 2, 6, 7, 8, 9]


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_every_token_is_on_one_rank_and_all_do_the_same_work(size):
    parts = [tokens_of_rank(BOUNDS, size, rank) for rank in range(size)]
    assert torch.cat(parts).sort().values.tolist() == list(range(64))
    starts = torch.tensor([0] * 16 + [16] * 32 + [48] * 16)
    work = {int((part - starts[part] + 1).sum()) for part in parts}
    assert len(work) == 1


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_the_gathered_parts_in_order_are_the_row(size):
    row = torch.randn(64)
    gathered = torch.cat([row[tokens_of_rank(BOUNDS, size, rank)] for rank in range(size)])
    assert torch.equal(gathered[whole_row(BOUNDS, size)], row)
