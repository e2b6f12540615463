"""metrics.jsonl over restarts: every step once, in order, whatever a killed process left."""

from __future__ import annotations

import json

import pytest

from oreal_megatron.config import parse_config
from oreal_megatron.metrics import Tracker, read_metrics
from oreal_megatron.types import EvaluationReport, StepReport

QUIET = ("tracking.console=quiet", "tracking.wandb=disabled", "tracking.tensorboard=false")


@pytest.fixture
def tracker(composed, tmp_path):
    config = parse_config(composed(*QUIET))

    def start(first_step, *, is_evaluated=False):
        made = Tracker(config, tmp_path, is_main=True)
        made.start(first_step, is_evaluated=is_evaluated)
        return made

    return start


def step(tracker, number, value=0.0):
    tracker.step(StepReport(step=number, metrics={"loss/policy": value}, seconds={"total": 1.0}))


def evaluation(tracker, number):
    tracker.evaluation(EvaluationReport(step=number, metrics={"heldout/greedy_pass@1": 0.5}, seconds=1.0))


def written(directory):
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [(record["kind"], record["step"]) for record in records]


@pytest.mark.parametrize("is_evaluated", [True, False])
def test_what_runs_again_replaces_what_was_written(tracker, tmp_path, is_evaluated):
    killed = tracker(0)
    evaluation(killed, 0)
    for number in range(4):
        step(killed, number)
        evaluation(killed, number + 1)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "st')  # killed in the middle of a line
    again = tracker(2, is_evaluated=is_evaluated)
    kept = [("evaluation", 0), ("step", 0), ("evaluation", 1), ("step", 1)]
    assert written(tmp_path) == kept + [("evaluation", 2)] * is_evaluated
    step(again, 2, 7.0)
    assert read_metrics(tmp_path)[0][2]["metrics"] == {"loss/policy": 7.0}


def test_a_line_that_is_no_record_is_named(tracker, tmp_path):
    step(tracker(0), 0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write("what?\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not a metrics record"):
        tracker(1)


def test_a_directory_goes_on_in_its_wandb_run(composed, tmp_path):
    pytest.importorskip("wandb", reason="wandb is not installed")
    config = parse_config(composed(*QUIET, "tracking.wandb=offline"))
    for first_step in (0, 1):
        tracker = Tracker(config, tmp_path, is_main=True)
        tracker.start(first_step, is_evaluated=False)
        step(tracker, first_step)
        tracker.close()
    names = [path.name for path in (tmp_path / "wandb").glob("offline-run-*")]
    assert names and {name.rpartition("-")[2] for name in names} == {(tmp_path / "wandb_id").read_text()}
