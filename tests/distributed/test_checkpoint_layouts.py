"""A checkpoint of one layout goes on in another: the next step's weights are the same up to rounding."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from tests.run_processes import content_of, together
from tests.tiny import metrics_of

pytestmark = pytest.mark.distributed

# At 1e-8 the first updates of AdamW are the signs of gradients, and turn rounding into whole steps.
STEADY = ("optimizer.policy.eps=1e-4", "optimizer.reward_model.eps=1e-4", "objective.actor_freeze_steps=0",
          "optimizer.policy.decay_steps=4", "optimizer.reward_model.decay_steps=4", "tracking.report=false",
          "run.checkpoint_every=1", "run.keep_checkpoints=4", "evaluation=none",
          "parallel.distributed_optimizer=true")  # fmt: skip
LAYOUTS = {
    "TP2xPP2": ("parallel.tensor=2", "parallel.pipeline=2"),
    "PP2xDP2": ("parallel.pipeline=2",),
}


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("saved", "resumed"), [("TP2xPP2", "PP2xDP2"), pytest.param("PP2xDP2", "TP2xPP2", marks=pytest.mark.slow)]
)
def test_the_next_step_is_the_same_on_another_layout(warm, tmp_path, single_process, saved, resumed):
    first = warm("first")
    go(first, LAYOUTS[saved], 3)
    # As it was killed behind the rollouts of its third step, in another place: the layout of the models alone differs.
    moved = tmp_path / "moved"
    shutil.copytree(first, moved)
    shutil.rmtree(moved / "checkpoints/step_000003")
    assert "resumed from checkpoint step_000002" in go(moved, LAYOUTS[resumed], 3)
    for mine, expected in zip(metrics_of(moved), metrics_of(first), strict=True):
        assert mine["metrics"] == pytest.approx(expected["metrics"], rel=1e-4, abs=1e-5)
    start, end, other = (weights_of(d) for d in (first / "checkpoints/step_000002", first / "checkpoints/step_000003",
                                                 moved / "checkpoints/step_000003"))  # fmt: skip
    assert end.keys() == other.keys()
    assert max(float(np.abs(end[name] - start[name]).max()) for name in end) > 1e-5, "the step changed nothing"
    worst = {name: difference(end[name], other[name]) for name in end}
    assert max(worst.values()) < 1e-6, sorted(worst.items(), key=lambda item: -item[1])[:5]


def difference(one, other):
    """The largest; rows that pad the vocabulary to a multiple of the tensor ranks, last in their tensor, left out."""
    size = min(len(one), len(other))
    assert max(len(one), len(other)) - size <= 32
    return float(np.abs(one[:size] - other[:size]).max())


def go(directory, layout, num_steps):
    return together(directory, *STEADY, f"run.num_steps={num_steps}", *layout, num_processes=4)


def weights_of(checkpoint):
    content = content_of(checkpoint)
    names = [n for n in content if n.startswith(("/policy.", "/reward_model.")) and ".optimizer/" not in n]
    return {n: np.frombuffer(content[n], np.float32) for n in names if isinstance(content[n], bytes)}
