"""Saving and restoring a run: a pending checkpoint is completed, and another learning rate is said."""

from __future__ import annotations

import functools
import math
import time
from types import SimpleNamespace

import pytest
import torch

from oreal_megatron.checkpoint.state import trained_state, weights_of_checkpoint
from oreal_megatron.checkpoint.store import Best, CheckpointStore, step_name
from oreal_megatron.config import AdamWConfig
from oreal_megatron.models.policy import build_policy
from oreal_megatron.models.trained_model import TrainedModel
from oreal_megatron.run_state import RunProgress, _warn_of_schedule, save
from tests.tiny_models import GEOMETRY, MODEL, VOCABULARY
from tests.unit.checkpoint.test_store import state, writing

__all__ = ["writing"]  # a fixture


def test_save_waits_for_a_checkpoint_that_is_being_written(tmp_path, single_process, writing):
    """A stop arrives while the last step's checkpoint is still being written."""
    store = CheckpointStore(tmp_path / "checkpoints", single_process, keep=2)
    writing(lambda: time.sleep(1.0))
    best, found = Best(step=2, score=0.5), []
    store.save(step_name(2), state(1.0), best=best, wait=False)
    assert not store.has(step_name(2))
    run = SimpleNamespace(
        config=SimpleNamespace(run=SimpleNamespace(mode="train")),
        progress=RunProgress(step=2, best=best),
        store=store,
        tracker=SimpleNamespace(finish_trajectories=lambda: found.append(store.has(step_name(2)))),
    )
    save(run, wait=True)  # nothing else of a run is needed: the step has its checkpoint
    assert store.steps == [2] and store.newest_whole() == 2
    assert found == [False], "trajectories are waited for before the checkpoint after which they are not written again"
    assert not list(store.directory.glob("*.partial-*"))


def test_policy_has_the_weights_of_a_checkpoint_for_a_while_and_then_its_own_to_the_bit(tmp_path, single_process):
    adamw = AdamWConfig(lr=1e-3, min_lr=1e-4, warmup_steps=0, decay_steps=None, weight_decay=0.0, betas=(0.9, 0.95),
                        eps=1e-4, clip_grad=1.0)  # fmt: skip
    policy = build_policy(GEOMETRY, MODEL, single_process, vocab_size=VOCABULARY, seed=0)
    trained = TrainedModel(policy, adamw, single_process, num_updates=9)
    store = CheckpointStore(tmp_path / "checkpoints", single_process, keep=2)
    store.save(step_name(1), trained_state("policy", trained))
    earlier = [parameter.detach().clone() for parameter in policy.parameters()]
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(1 / 3)
    own = [parameter.detach().clone() for parameter in policy.parameters()]
    with weights_of_checkpoint("policy", policy, functools.partial(store.load, step_name(1))):
        assert all(map(torch.equal, policy.parameters(), earlier))
    assert all(map(torch.equal, policy.parameters(), own)) and not torch.equal(own[0], earlier[0])


@pytest.mark.parametrize("saved", [4, 9])
def test_another_length_of_the_cosine_is_said_with_the_learning_rate_and_the_remedy(single_process, caplog, saved):
    policy = build_policy(GEOMETRY, MODEL, single_process, vocab_size=VOCABULARY, seed=0)
    adamw = AdamWConfig(lr=1e-3, min_lr=1e-4, warmup_steps=0, decay_steps=None, weight_decay=0.0, betas=(0.9, 0.95),
                        eps=1e-4, clip_grad=1.0)  # fmt: skip
    trained = TrainedModel(policy, adamw, single_process, num_updates=9)
    trained.schedule.step(4)
    _warn_of_schedule("optimizer.policy", saved, trained)
    if saved == 9:
        assert not caplog.text
    else:
        lr = 1e-4 + 9e-4 * 0.5 * (1 + math.cos(math.pi * 4 / 9))
        assert f"update 4 has a learning rate of {lr:.3g}; optimizer.policy.decay_steps=4 keeps" in caplog.text
