"""`objective.optimizer: release`: the learning rates, the weight decay and the head of the authors' release."""

from __future__ import annotations

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

from oreal_megatron.config import AdamWConfig
from oreal_megatron.models.policy import build_policy
from oreal_megatron.models.reward_model import build_reward_model
from oreal_megatron.models.trained_model import TrainedModel
from tests.tiny_models import GEOMETRY, MODEL, VOCABULARY

ADAMW = AdamWConfig(lr=5e-7, min_lr=1e-7, warmup_steps=10, decay_steps=None, weight_decay=0.01, betas=(0.9, 0.999),
                    eps=1e-8, clip_grad=1.0)  # fmt: skip
TOTAL = 90


def model(single_process, *, as_in_release: bool) -> TrainedModel:
    policy = build_policy(GEOMETRY, MODEL, single_process, vocab_size=VOCABULARY, seed=0)
    return TrainedModel(policy, ADAMW, single_process, num_updates=TOTAL, as_in_release=as_in_release)


def rates(trained: TrainedModel) -> list[float]:
    found = []
    for _ in range(TOTAL):
        trained.advance_schedule()
        found.append(trained.optimizer.param_groups[0]["lr"])
    return found


def rates_of_release() -> list[float]:
    """Returns the learning rates of the release: train_oreal.py steps one of two torch schedulers before an update."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(()))], lr=ADAMW.lr)
    warmup = LambdaLR(optimizer, lambda x: min(x / ADAMW.warmup_steps, 1))
    cosine = CosineAnnealingLR(optimizer, T_max=TOTAL - ADAMW.warmup_steps, eta_min=ADAMW.min_lr)
    found = []
    for step in range(TOTAL):
        optimizer.step()
        (warmup if step <= ADAMW.warmup_steps else cosine).step()
        found.append(optimizer.param_groups[0]["lr"])
    return found


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_learning_rates_of_the_release_are_reproduced(single_process):
    found = rates(model(single_process, as_in_release=True))
    assert found == pytest.approx(rates_of_release(), rel=1e-12)
    assert found[10] == ADAMW.lr and found[89] == pytest.approx(1.00154e-7, rel=1e-5)
    standard = rates(model(single_process, as_in_release=False))
    assert standard[:10] == found[:10] and standard[10] < ADAMW.lr and standard[89] == ADAMW.min_lr


def test_release_decays_biases_and_norms(single_process):
    def decays(trained: TrainedModel) -> set[float]:
        trained.advance_schedule()
        return {group["weight_decay"] for group in trained.optimizer.param_groups}

    assert decays(model(single_process, as_in_release=True)) == {0.01}
    assert decays(model(single_process, as_in_release=False)) == {0.01, 0.0}


def test_an_untrained_head_bias_has_no_part_in_the_optimizer(single_process):
    def trained_names(train_head_bias: bool) -> set[str]:
        module = build_reward_model(
            GEOMETRY, MODEL, single_process, vocab_size=VOCABULARY, seed=0, train_head_bias=train_head_bias
        )
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        trained = TrainedModel(module, ADAMW, single_process, num_updates=TOTAL, as_in_release=True)
        return {names[id(p)] for group in trained.optimizer.param_groups for p in group["params"]}

    assert trained_names(True) - trained_names(False) == {"output_layer.bias"}
