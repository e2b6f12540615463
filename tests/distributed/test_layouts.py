"""The same run on two processes, whatever they split: rollouts, losses and gradient norms are those of one process."""

from __future__ import annotations

import pytest

from tests.run_processes import together
from tests.tiny import metrics_of

pytestmark = pytest.mark.distributed

# At 1e-8 the first updates of AdamW are the signs of gradients, and turn rounding into whole steps.
STEADY = ("optimizer.policy.eps=1e-4", "optimizer.reward_model.eps=1e-4", "run.num_steps=3", "run.checkpoint_every=0",
          "evaluation.every=0", "tracking.report=false")  # fmt: skip
LAYOUTS = {
    "DP2": ("parallel.distributed_optimizer=true", "parallel.overlap_grad_reduce=true"),
    "TP2": ("parallel.tensor=2", "parallel.sequence=true"),
    "PP2": ("parallel.pipeline=2", "parallel.recompute=full"),
    "CP2": ("parallel.context=2",),
}


def test_two_processes_train_as_one(warm):
    one = warm("one")
    together(one, *STEADY, num_processes=1)
    for name, layout in LAYOUTS.items():
        directory = warm(name)
        together(directory, *STEADY, *layout, num_processes=2)
        for mine, expected in zip(metrics_of(directory), metrics_of(one), strict=True):
            assert (mine["kind"], mine["step"]) == (expected["kind"], expected["step"])
            assert mine["metrics"] == pytest.approx(expected["metrics"], rel=1e-3, abs=1e-5), name
