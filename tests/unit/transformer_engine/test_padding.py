"""Rows of packed tokens are as long as the recipes of all models ask, on every context and tensor rank."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from oreal_megatron.config import Fp8Config, Fp8ModelConfig, GeometryConfig, ParallelConfig
from oreal_megatron.config.fp8_recipes import RECIPES
from oreal_megatron.data.packing import PackedSequence, Packer
from oreal_megatron.distributed.groups import ParallelGroups

GEOMETRY = GeometryConfig(
    num_layers=2, hidden_size=64, ffn_hidden_size=64, num_attention_heads=4, num_query_groups=4, vocab_size=32
)


def groups(tensor: int, context: int, sequence: bool) -> ParallelGroups:
    layout = ParallelConfig(tensor=tensor, pipeline=1, context=context, sequence=sequence, micro_batch_tokens=1000)
    nothing: Any = None
    return ParallelGroups(layout, nothing, tensor, 0, 1, 0, context, 0, 1, 0)


def model(recipe) -> Fp8ModelConfig:
    return Fp8ModelConfig(
        recipe=recipe, format="e4m3", bf16_first_layers=0, bf16_last_layers=0, amax_history=None, parameters=False
    )


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("tensor", "context"), [(1, 1), (2, 1), (8, 1), (1, 2), (2, 2), (4, 4), (3, 2)])
def test_every_ranks_tokens_are_a_multiple(recipe, tensor, context):
    fp8 = Fp8Config(policy=model(recipe), reward_model=None, reference=None)
    packer = Packer.of_layout(groups(tensor, context, tensor > 1), GEOMETRY, 32, fp8=fp8)
    sequences = [PackedSequence(str(i), (1,) * 3, (2,) * (5 + 7 * i)) for i in range(9)]
    for batch in packer.batches(sequences):
        length = batch.tokens.size(1)
        # What Transformer Engine and Megatron-Core's own padding ask for, and that of every context rank's part.
        assert length % math.lcm({"mxfp8": 32, "blockwise": 128}.get(recipe, 16), tensor * context * 2) == 0
        assert (length // context) % RECIPES[recipe].tokens == 0
        assert batch.cu_seqlens[-1] == length
        lengths = torch.diff(batch.cu_seqlens)
        assert (lengths % packer.padding.sequence == 0).all()


def test_the_most_demanding_model_decides_and_none_changes_nothing():
    mixed = Fp8Config(policy=model("mxfp8"), reward_model=model("blockwise"), reference=None)
    assert Packer.of_layout(groups(1, 1, False), GEOMETRY, 32, fp8=mixed).padding.row == 128
    for off in (None, Fp8Config(policy=None, reward_model=None, reference=None)):
        assert Packer.of_layout(groups(2, 2, True), GEOMETRY, 32, fp8=off).padding.row == 4
        assert Packer.of_layout(groups(2, 1, False), GEOMETRY, 32, fp8=off).padding.row == 1
