"""The same run on two processes, whatever they split: rollouts, losses and gradient norms are those of one process."""

from __future__ import annotations

import pytest

from tests.tiny import invoke, metrics_of

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("layout", [(), ("parallel.tensor=2",), ("parallel.pipeline=2",)], ids=["DP2", "TP2", "PP2"])
def test_two_processes_train_as_one(finished, warm, layout):
    directory = warm()
    outcome = invoke(f"run.dir={directory}", *layout, num_processes=2)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    for mine, one in zip(metrics_of(directory), metrics_of(finished), strict=True):
        assert (mine["kind"], mine["step"]) == (one["kind"], one["step"])
        assert mine["metrics"] == pytest.approx(one["metrics"], rel=1e-3, abs=1e-5)
