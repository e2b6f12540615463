"""metrics.jsonl over restarts: every step once, in order, whatever a killed process left."""

from __future__ import annotations

import json

import pytest

from oreal_megatron.config import ConfigError, parse_config
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


NO_RECORDS = (
    "what?",
    "7",
    "[]",
    '{"kind": "step"}',
    '{"kind": "x", "step": 1, "metrics": {}}',
    '{"kind": "step", "step": "1", "metrics": {}}',
    '{"kind": "step", "step": 1, "metrics": 0}',
)


@pytest.mark.parametrize("line", NO_RECORDS)
def test_a_line_that_is_no_record_is_named_and_kept(tracker, tmp_path, caplog, line):
    step(tracker(0), 0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(f"{line}\n")
    content = (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not a metrics record"):
        read_metrics(tmp_path)
    tracker(1)
    assert "metrics.jsonl:2: not a metrics record" in caplog.text and "no record of" not in caplog.text
    assert written(tmp_path) == [("step", 0)]
    assert (tmp_path / "metrics.jsonl.damaged").read_text() == content


def test_lost_records_are_named(tracker, tmp_path, caplog):
    first = tracker(0)
    for number in range(4):
        step(first, number)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text(lines[0] + lines[3])
    tracker(4)
    assert "no record of 2 steps from 1 to 2 of 4" in caplog.text and written(tmp_path) == [("step", 0), ("step", 3)]
    caplog.clear()
    (tmp_path / "metrics.jsonl").unlink()
    tracker(1)
    assert "no record of step 0 of 1" in caplog.text


def test_wandb_without_a_key_is_refused_before_any_work(composed, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    config = parse_config(composed(*QUIET, "tracking.wandb=online"))
    with pytest.raises(ConfigError, match=r"tracking.wandb = 'online': wandb says: .*tracking.wandb=offline"):
        Tracker(config, tmp_path, is_main=True)


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
