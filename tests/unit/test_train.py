"""The reward model's updates in a step: what it learns from, how often, and which scores weigh the tokens."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from oreal_megatron.checkpoint.store import Best, is_better
from oreal_megatron.config import parse_config
from oreal_megatron.data.packing import PackedSequence, Packer
from oreal_megatron.evaluation import score_of
from oreal_megatron.losses.advantages import select_trajectories
from oreal_megatron.models.reward_model import build_reward_model
from oreal_megatron.train import train_reward_model
from oreal_megatron.types import Benchmark, FinishReason, Grade, GradedRollout, Prompt, Rollout, Verdict, WeightSpan
from tests.tiny_models import GEOMETRY
from tests.unit.test_step import trained

C, W, U = Verdict.CORRECT, Verdict.INCORRECT, Verdict.UNDECIDED


def graded(prompt: str, index: int, verdict: Verdict) -> GradedRollout:
    rollout = Rollout(
        prompt=Prompt(id=prompt, question="q", gold_answer="1"), sample_index=index, prompt_ids=(1, 2),
        response_ids=np.array([3 + index, 4, 5], np.int32), logprobs=np.full(3, -1.0, np.float32), text="",
        finish_reason=FinishReason.STOP, weight_spans=(WeightSpan(version=0, start=0, end=3),),
    )  # fmt: skip
    return GradedRollout(rollout=rollout, grade=Grade(verdict=verdict, reason="", stage=""))


GROUPS = [[graded("a", i, v) for i, v in enumerate([C, W, W, U])], [graded("b", i, v) for i, v in enumerate([C, C])]]


@pytest.mark.parametrize(
    ("overrides", "num_learned", "num_updates"),
    [
        ([], 2, 1),
        (["objective.reward_model.responses=all"], 5, 1),
        (["objective.reward_model.responses=all", "objective.reward_model.updates=3"], 5, 3),
        (["objective.reward_model.responses=all", "objective.undecided_as_incorrect=true"], 6, 1),
        (["objective.reward_model.updates=2", "objective.reward_model.ranking_weight=1.0"], 2, 2),
    ],
)
def test_reward_model_learns_from_what_is_asked_and_weighs_by_its_earlier_scores(
    composed, single_process, overrides, num_learned, num_updates
):
    config = parse_config(composed("objective=oreal", *overrides))
    selection = select_trajectories(GROUPS, config.objective, seed=0, step=0, global_rng=None)
    packer = Packer.of_layout(single_process, GEOMETRY, 105)
    run = SimpleNamespace(config=config, groups=single_process, packer=packer)
    model = trained(build_reward_model, single_process)
    learned = []

    def forward_backward(batches, loss):
        learned.append([id for batch in batches for id in batch.ids])
        return type(model).forward_backward(model, batches, loss)

    model.forward_backward = forward_backward
    batches = packer.batches([PackedSequence.from_trajectory(t, weight_version=0) for t in selection.trajectories])
    scored, metrics = train_reward_model(run, model, GROUPS, selection, batches)
    assert len(scored.mean_scores) == 2
    assert scored.mean_scores == [0.0, 0.0], "a fresh head scores 0; after an update it would not"
    assert [len(ids) for ids in learned] == [num_learned] * num_updates and model.schedule.num_steps == num_updates
    assert metrics["reward_model/auc_within_prompts"] == 0.5, "from before the updates"
    assert model.module.output_layer.weight.abs().sum() > 0
    if num_updates == 1:
        assert metrics["loss/reward_model"] == pytest.approx(math.log(2))
    else:
        assert metrics["loss/reward_model"] < math.log(2) - 1e-4, "of the last update"
    assert torch.isfinite(torch.tensor(list(metrics.values()))).all()


def test_best_checkpoint_is_that_of_the_first_benchmark_or_of_the_lowest_loss():
    metrics = {"a/greedy_pass@1": 0.25, "b/greedy_pass@1": 0.75, "sft/heldout_loss": 2.0}
    benchmarks = [Benchmark(name=name, prompts=(), samples=0) for name in ("a", "b")]
    assert score_of(metrics, benchmarks) == 0.25
    assert is_better(score_of({"sft/heldout_loss": 1.5}, ()), Best(step=0, score=score_of(metrics, ())))
