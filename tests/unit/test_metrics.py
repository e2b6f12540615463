"""metrics.jsonl over restarts: every step once, in order, whatever a killed process left."""

from __future__ import annotations

import io
import json
import logging
import math
import random
import threading

import numpy as np
import pytest
from rich.console import Console

from oreal_megatron.config import ConfigError, parse_config
from oreal_megatron.log import run_logging
from oreal_megatron.losses.advantages import select_trajectories
from oreal_megatron.metrics import Tracker, read_metrics, rollout_metrics, shown_value
from oreal_megatron.types import EvaluationReport, Prompt, StepReport, Verdict
from tests.graded import graded
from tests.run_processes import wait_until

PARTS = {"reward/pass_rate": 0.5, "loss/reward_model": 0.69, "reward_model/auc": math.nan}
QUIET = ("tracking.console=quiet", "tracking.wandb=disabled", "tracking.tensorboard=false")


@pytest.fixture
def tracker(composed, tmp_path):
    config = parse_config(composed(*QUIET))

    def start(first_step, *, is_evaluated=False, pending_evaluation=None):
        made = Tracker(config, tmp_path, is_main=True)
        made.start(first_step, is_evaluated=is_evaluated, pending_evaluation=pending_evaluation)
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
    # wandb names a run offline-run-<second>-<id>, and appends a number where two start within a second.
    assert names and {name.split("-")[3] for name in names} == {(tmp_path / "wandb_id").read_text()}


def late(tracker, number, ended_after):
    metrics = {"heldout/greedy_pass@1": 0.5}
    tracker.evaluation(
        EvaluationReport(step=number, metrics=metrics, seconds=9.0, ended_after=ended_after, waited_seconds=0.5)
    )


def test_late_evaluation_has_its_own_step_and_is_written_again_while_it_is_pending(tracker, tmp_path):
    killed = tracker(0)
    for number in range(3):
        step(killed, number)
    late(killed, 1, ended_after=3)
    killed.close()
    assert written(tmp_path)[-1] == ("evaluation", 1)
    (record,) = read_metrics(tmp_path)[1]
    assert (record["ended_after"], record["waited_seconds"]) == (3, 0.5)
    tracker(2).close()
    assert written(tmp_path) == [("step", 0), ("evaluation", 1), ("step", 1)]  # it ended before this checkpoint
    tracker(2, pending_evaluation=1).close()
    assert written(tmp_path) == [("step", 0), ("step", 1)]


def wandb_records(data):
    """The records of an offline run's file: LevelDB's log format (blocks of 32 KiB) behind seven bytes."""
    position, record = 7, b""
    while position < len(data):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield record
            record = b""


def rows_of(directory):
    """Step, score and evaluation/step of the rows of an offline run."""
    from wandb.proto import wandb_internal_pb2

    rows = []
    for data in wandb_records(next((directory / "wandb").glob("offline-run-*/*.wandb")).read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.HasField("history"):
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            rows.append(
                (items.get("step"), items.get("evaluation/heldout/greedy_pass@1"), items.get("evaluation/step"))
            )
    return rows


@pytest.mark.parametrize("ended_after", [3, None])  # None: training waited for the end of it, after a resume
def test_wandb_gets_a_late_evaluation_under_its_own_step(ended_after, composed, tmp_path):
    pytest.importorskip("wandb", reason="wandb is not installed")
    tracker = Tracker(parse_config(composed(*QUIET, "tracking.wandb=offline")), tmp_path, is_main=True)
    tracker.start(0, is_evaluated=False)
    for number in range(3):
        step(tracker, number)
    late(tracker, 1, ended_after=ended_after)
    step(tracker, 3)
    tracker.close()
    wait_until(lambda: rows_of(tmp_path))  # wandb's own process writes them
    rows = rows_of(tmp_path)
    assert rows == [(0, None, None), (1, None, None), (2, 0.5, 1), (3, None, None)]


@pytest.fixture
def terminal(composed, tmp_path):
    """A tracker on a terminal, and the text that it has shown."""
    tracker = Tracker(parse_config(composed(*QUIET, "tracking.console=rich")), tmp_path, is_main=True)
    tracker.console, tracker._fancy = Console(file=io.StringIO(), force_terminal=True, width=200), True
    with run_logging(tmp_path, rank=0, level="INFO", console=tracker.console):
        yield tracker, tracker.console.file.getvalue


def test_each_step_has_a_line_of_words_with_its_number_in_metrics(terminal, tmp_path):
    tracker, shown = terminal
    tracker.start(0, is_evaluated=False)
    with tracker.progress("steps", 2) as bar:
        for number in range(2):
            tracker.step(StepReport(step=number, metrics=PARTS, seconds={"total": 1.25}))
            bar.advance()
    for number in range(2):
        assert shown().count(f"step {number}  correct 50%  reward model loss 0.690  in 1.2 s") == 1
    assert "nan" not in shown() and "remaining" in shown() and "2/2" in shown()
    assert [record["step"] for record in read_metrics(tmp_path)[0]] == [0, 1]


def test_bar_without_a_way_to_go_is_not_shown(terminal):
    tracker, shown = terminal
    with tracker.progress("pass rates", 0):
        pass
    assert shown() == ""


def test_evaluation_says_how_many_problems_and_shares_in_percent(tracker, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("oreal_megatron"), "propagate", True)
    caplog.set_level("INFO", "oreal_megatron")
    values = {"b/problems": 30.0, "b/greedy_pass@1": 0.3, "b/avg@4": math.nan, "b/response_tokens": 12.25}
    tracker(0).evaluation(EvaluationReport(step=0, metrics=values, seconds=1.0))
    said = "evaluation before the first step  b: problems 30  greedy_pass@1 30.0%  avg@4 -  response_tokens 12.2"
    assert said in caplog.text


def test_shown_values():
    assert shown_value("b/reward_model_auc", 0.756) == "0.76" and shown_value("b/pass@4", None) == "-"


def test_trajectories_are_written_behind_the_run_and_waited_for(tracker, tmp_path):
    writer, go_on = tracker(0), threading.Event()

    def records():
        assert go_on.wait(60)
        yield {"id": "a", "token_weights": np.float32([0.1234, 1.0]), "text": "\\frac"}

    writer.trajectories("trajectories/step_000000", records())
    path = tmp_path / "trajectories/step_000000.jsonl"
    assert not path.is_file()  # the call has returned before the first record exists
    go_on.set()
    writer.finish_trajectories()
    assert json.loads(path.read_text()) == {"id": "a", "token_weights": [0.1234, 1.0], "text": "\\frac"}


@pytest.mark.parametrize("then", ["trajectories", "finish_trajectories"])
def test_error_of_trajectories_is_raised_by_the_next_call(tracker, tmp_path, then):
    writer = tracker(0)
    (tmp_path / "trajectories").write_text("a file in the place of the directory")
    writer.trajectories("trajectories/step_000000", [{}])
    with pytest.raises(OSError, match="trajectories"):
        writer.trajectories(
            "trajectories/step_000001", [{}]
        ) if then == "trajectories" else writer.finish_trajectories()
    writer.close()


def test_error_of_trajectories_that_nothing_waits_for_is_logged(tracker, tmp_path, caplog):
    writer = tracker(0)
    (tmp_path / "trajectories").write_text("a file in the place of the directory")
    writer.trajectories("trajectories/step_000000", [{}])
    writer.close()
    assert "trajectories" in caplog.text


def test_a_rising_share_of_undecided_responses_is_said_also_over_a_restart(tracker, caplog):
    def steps(made, numbers, undecided):
        for number in numbers:
            metrics = {"reward/undecided": undecided, "rollout/responses": 100.0}
            made.step(StepReport(step=number, metrics=metrics, seconds={"total": 1.0}))

    made = tracker(0)
    steps(made, range(20), 2.0)
    assert "UNDECIDED" not in caplog.text
    made.close()
    steps(tracker(20), range(20, 30), 5.0)
    assert "have risen from 2.0% in the first 10 steps to 5.0% in the last 10" in caplog.text


@pytest.mark.parametrize(
    ("mismatch", "is_said"),
    [
        (lambda step: 0.011 + 0.0008 * step, True),
        (lambda step: 0.011 + 0.0001 * step, False),  # less than half in 30 steps
        (lambda step: 0.011, False),
        (lambda step: 0.011 + 0.01 * (step == 27), False),  # one step is no trend
        (lambda step: 1e-7 * (1 + step), False),  # rounding
    ],
)
def test_rollouts_that_drift_from_the_policy_are_said_also_over_a_restart(tracker, caplog, mismatch, is_said):
    rng = random.Random(0)

    def steps(made, numbers):
        for number in numbers:
            noisy = mismatch(number) * rng.uniform(0.9, 1.1)
            metrics = {"policy/rollout_logprob_difference": noisy}
            made.step(StepReport(step=number, metrics=metrics, seconds={"total": 1.0}))

    made = tracker(0)
    steps(made, range(12))
    made.close()
    assert "drift" not in caplog.text
    steps(tracker(12), range(12, 30))
    assert ("drift apart" in caplog.text) == is_said


def test_a_step_says_which_prompts_it_drew_by_band_and_source(composed):
    prompts = [
        Prompt(id=f"{i}", question="q", gold_answer="1", pass_rate=rate, source=source)
        for i, (rate, source) in enumerate([(0.0, "math"), (0.25, "math"), (0.375, "code"), (1.0, "math")])
    ]
    groups = [[graded(prompt, i, verdict) for i, verdict in enumerate(Verdict)] for prompt in prompts]
    selection = select_trajectories(
        groups, parse_config(composed()).objective, seed=0, step=0, global_rng=random.Random(0)
    )
    metrics = rollout_metrics(groups, selection)
    drawn = {name: value for name, value in metrics.items() if name.startswith("data/drawn_") and value}
    assert drawn == {
        "data/drawn_pass_rate_0": 0.25,
        "data/drawn_pass_rate_0.2_to_0.4": 0.5,
        "data/drawn_pass_rate_1": 0.25,
        "data/drawn_from_code": 0.25,
        "data/drawn_from_math": 0.75,
    }
