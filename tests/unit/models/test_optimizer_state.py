"""A resumed model makes the next update to the bit, whichever of Megatron-Core's optimizers it has."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from oreal_megatron.checkpoint.state import load_trained, trained_state
from oreal_megatron.checkpoint.store import CheckpointStore
from oreal_megatron.config import parse_config
from oreal_megatron.data.packing import pack
from oreal_megatron.models.reward_model import build_reward_model
from oreal_megatron.models.trained_model import TrainedModel
from oreal_megatron.step import update_reward_model
from tests.unit.test_step import ADAMW, CPU, GEOMETRY, MODEL, sequences


@pytest.mark.parametrize(
    ("dtype", "distributed_optimizer", "num_updates"),
    [("float32", False, 0), ("float32", True, 2), ("bfloat16", False, 1), ("bfloat16", True, 0)],
)
def test_a_resumed_model_makes_the_same_update(
    composed, single_process, tmp_path, dtype, distributed_optimizer, num_updates
):
    """The reward model, whose head is fp32 beside bf16 weights."""
    objective = parse_config(composed("objective=oreal")).objective
    layout = single_process.layout.model_copy(update={"distributed_optimizer": distributed_optimizer})
    groups = replace(single_process, layout=layout)
    store = CheckpointStore(tmp_path / "checkpoints", groups, keep=1)

    def trained(seed: int) -> TrainedModel:
        model = MODEL.model_copy(update={"dtype": dtype})
        module = build_reward_model(GEOMETRY, model, groups, vocab_size=105, seed=seed)
        return TrainedModel(module, ADAMW, groups, num_updates=10)

    def update(model: TrainedModel) -> dict[str, float]:
        return update_reward_model(model, [pack(sequences()[:3], CPU)], objective, num_sequences=3)[1]

    going_on = trained(seed=0)
    for _ in range(num_updates):
        update(going_on)
    store.save("saved", trained_state("model", going_on))
    resumed = trained(seed=1)
    load_trained("model", resumed, store.load("saved", trained_state("model", resumed, is_loading=True)))
    for _ in range(2):  # the second needs what the first made of the state
        assert update(resumed) == update(going_on)
    for mine, expected in zip(resumed.module.parameters(), going_on.module.parameters(), strict=True):
        assert torch.equal(mine, expected)
