"""A run that is killed again and again ends as the one that was not."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.run_processes import RunProcess, content_of, journalled, trajectories_of
from tests.tiny import TINY, metrics_of

pytestmark = pytest.mark.end_to_end

# Four units a step; everything that is journalled stays, so that a repetition would show.
UNITS = ("rollout.batch_size=8", "run.keep_checkpoints=100", "objective.actor_freeze_steps=1")
PROMPTS, PROMPTS_PER_STEP = 48, 8


def run_with_kills(directory: Path, overrides: tuple[str, ...], kinds: list[str], seed: int) -> list[str]:
    """Starts the same command until it ends by itself; kills it once for each kind. Returns the kills made."""
    rng = random.Random(seed)
    made = []
    for kind in kinds:
        process = RunProcess(directory, *overrides)
        if kind == "rollout":
            # In the middle of a step's rollouts, or close behind them.
            goal = len(journalled(directory)) + rng.randint(1, 7)
            alive = process.wait_until(lambda goal=goal: len(journalled(directory)) >= goal)
        elif kind == "checkpoint":
            left = partials(directory)
            alive = process.wait_until(lambda left=left: bool(partials(directory) - left))
        else:
            alive = process.wait_until(lambda process=process: " INFO step " in process.said())
            time.sleep(rng.uniform(0, 2))
        time.sleep(rng.uniform(0, 0.1))
        if process.is_over or not alive:
            assert process.wait() == 0, process.said()
            break
        process.kill(with_children=rng.random() < 0.5)
        made.append(kind)
    last = RunProcess(directory, *overrides)
    assert last.wait() == 0, last.said()
    return made


def partials(directory: Path) -> set[Path]:
    """Checkpoints that are being written, or never were finished."""
    return set((directory / "checkpoints").glob("step_*.partial-*"))


def assert_same_run(killed: Path, whole: Path, num_steps: int) -> None:
    assert metrics_of(killed) == metrics_of(whole)
    trajectories = trajectories_of(killed)
    assert trajectories == trajectories_of(whole)
    assert (killed / "checkpoints/best.json").read_text() == (whole / "checkpoints/best.json").read_text()
    mine, expected = (but_evaluation(content_of(d / "checkpoints" / f"step_{num_steps:06d}")) for d in (killed, whole))
    for part in ("/policy.", "/reward_model.", "exp_avg_sq.policy.", "exp_avg.reward_", "/common/stream/pools/"):
        assert any(part in name for name in expected), (part, sorted(expected))
    assert mine.keys() == expected.keys()
    assert [name for name in expected if mine[name] != expected[name]] == []
    # No prompt twice or never: every epoch of the stream has each of them once.
    steps = [trajectories[f"step_{step:06d}.jsonl"] for step in range(num_steps)]
    epoch = PROMPTS // PROMPTS_PER_STEP
    for start in range(0, num_steps - epoch + 1, epoch):
        ids = [id for step in steps[start : start + epoch] for id in {r["prompt"]["id"] for r in step}]
        assert len(ids) == len(set(ids)) == PROMPTS
    units = journalled(killed)
    assert len(units) == len(set(units)), "a journalled unit was generated again"


def but_evaluation(content: dict[str, Any]) -> dict[str, Any]:
    """Leaves out the last evaluation: a stop during it saves the step without it, and a resume evaluates again."""
    return {name: item for name, item in content.items() if not re.search("/progress/(evaluated_step|best)", name)}


def check(warm, kinds: list[str], num_steps: int, seed: int, *overrides: str) -> None:
    overrides = (*UNITS, f"run.num_steps={num_steps}", *overrides)
    whole, killed = warm("whole"), warm("killed")
    uninterrupted = RunProcess(whole, *overrides)
    made = run_with_kills(killed, overrides, kinds, seed)
    assert uninterrupted.wait() == 0, uninterrupted.said()
    assert made == kinds, f"the run was over after {made}"
    assert_same_run(killed, whole, num_steps)


def test_three_kills_change_nothing(warm, single_process):
    check(warm, ["rollout", "checkpoint", "any"], 8, 0)


def test_a_kill_changes_nothing_where_a_step_has_several_updates(warm, single_process):
    check(warm, ["rollout", "checkpoint"], 8, 2, "objective.updates={epochs: 2, minibatches: 2}")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("mode", ["true", "false"], ids=["async", "sync"])
def test_twenty_kills_change_nothing(warm, single_process, mode):
    kinds = random.Random(1).choices(["rollout", "checkpoint", "any"], k=20)
    check(warm, kinds, 60, 1, "run.checkpoint_every=3", f"run.async_checkpoints={mode}")


STOPPED = ("rollout.batch_size=8", "run.checkpoint_every=0", "evaluation.every=0")


@pytest.fixture(scope="module")
def whole(finished, tmp_path_factory) -> Path:
    """What the runs that a signal stops would have been."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    shutil.copytree(finished / "checkpoints/initial", directory / "checkpoints/initial")
    process = RunProcess(directory, *STOPPED)
    assert process.wait() == 0, process.said()
    return directory


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT])
def test_a_signal_saves_and_stops_within_a_step_and_loses_nothing(warm, whole, single_process, number):
    directory = warm()
    process = RunProcess(directory, *STOPPED)
    goal = 9  # in the third step's rollouts, without a checkpoint so far
    assert process.wait_until(lambda: sum(1 for _ in steps_of(directory)) >= goal)
    process.signal(number, with_children=number == signal.SIGINT)  # Ctrl-C reaches all processes of a terminal
    assert process.wait() == 75, process.said()
    assert (
        f"{number.name}: stopping" in process.said()
        and "stopped after 2 steps: checkpoint step_000002" in process.said()
    )
    assert [r["step"] for r in metrics_of(directory) if r["kind"] == "step"] == [0, 1]
    again = RunProcess(directory, *STOPPED)
    assert again.wait() == 0 and "resumed from checkpoint step_000002" in again.said()
    assert metrics_of(directory) == metrics_of(whole)
    mine, expected = (content_of(d / "checkpoints/step_000004") for d in (directory, whole))
    assert [name for name in expected if mine[name] != expected[name]] == []


def steps_of(directory: Path) -> list[str]:
    """Journalled units of training steps."""
    return [line for path in (directory / "journal").glob("step_*.jsonl") for line in path.read_text().split("\n")[:-1]]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(1800)
def test_two_processes_stop_together_and_outlive_a_kill(warm, single_process):
    """A signal to one rank stops both; then all processes are killed in the middle of a step's rollouts."""
    overrides = (*UNITS, "run.num_steps=4", "run.checkpoint_every=0", "evaluation.every=0")
    directory, whole = warm(), warm("whole")
    torchrun = start_two(directory, overrides)
    wait_for_units(directory, 6)
    worker = torchrun.children()[0]
    worker.send_signal(signal.SIGUSR1)
    said, _ = torchrun.communicate(timeout=300)
    assert torchrun.returncode != 0
    assert len(re.findall(r"stopped after [12] steps: checkpoint step_00000[12] is saved", said)) == 2, said
    torchrun = start_two(directory, overrides)
    wait_for_units(directory, 11)
    for process in [*torchrun.children(recursive=True), torchrun]:
        process.kill()
    torchrun.wait(60)
    for one in (directory, whole):
        last = start_two(one, overrides)
        said, _ = last.communicate(timeout=600)
        assert last.returncode == 0, said
    assert_same_run(directory, whole, 4)


def start_two(directory, overrides):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "oreal_megatron.cli.train", *TINY, f"run.dir={directory}", *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return psutil.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def wait_for_units(directory: Path, number: int) -> None:
    end = time.monotonic() + 300
    while len(steps_of(directory)) < number:
        assert time.monotonic() < end
        time.sleep(0.01)
