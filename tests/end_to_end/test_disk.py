"""Disks that fill up and files that change: clear errors, and nothing that was whole is lost."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.run_processes import RunProcess, content_of
from tests.tiny import metrics_of

pytestmark = pytest.mark.end_to_end


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 6 MiB of its own."""
    if os.geteuid() != 0:
        pytest.skip("mounting a tmpfs needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("this machine lets root mount nothing")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def fill(disk: Path, leave: int) -> Path:
    """Takes the free space but for `leave` bytes."""
    status = os.statvfs(disk)
    filler = disk / "filler"
    filler.write_bytes(b"\0" * (status.f_bavail * status.f_frsize - leave))
    return filler


def test_a_full_disk_stops_the_run_and_room_lets_it_go_on(small_disk, warm, finished, single_process):
    directory = small_disk / "run"
    (directory / "checkpoints").mkdir(parents=True)
    subprocess.run(["cp", "-r", finished / "checkpoints/initial", directory / "checkpoints"], check=True)
    schedules = ("optimizer.policy.decay_steps=4", "optimizer.reward_model.decay_steps=4", "tracking.report=false")
    assert RunProcess(directory, *schedules, "run.num_steps=2").wait() == 0
    good = content_of(directory / "checkpoints/step_000002")

    filler = fill(small_disk, leave=400_000)  # rollouts and metrics fit, a checkpoint of 0.8 MB does not
    full = RunProcess(directory, *schedules)
    assert full.wait() == 1
    assert "checkpoint step_000004 cannot be written" in full.said(), full.said()
    assert "No space left on device" in full.said() and "Traceback" not in full.said(), full.said()
    assert "run the same command again" in full.said()
    assert sorted(path.name for path in (directory / "checkpoints").iterdir()) == [
        "best.json",
        "initial",
        "step_000002",
    ]
    assert content_of(directory / "checkpoints/step_000002") == good

    filler.unlink()
    fill(small_disk, leave=0)  # not even a line of the journal
    fuller = RunProcess(directory, *schedules)
    assert fuller.wait() == 1
    assert "No space left on device" in fuller.said() and "Traceback" not in fuller.said(), fuller.said()
    assert content_of(directory / "checkpoints/step_000002") == good

    (small_disk / "filler").unlink()
    assert RunProcess(directory, *schedules).wait() == 0
    whole = warm("whole")
    assert RunProcess(whole, *schedules).wait() == 0
    assert metrics_of(directory) == metrics_of(whole)
    assert content_of(directory / "checkpoints/step_000004") == content_of(whole / "checkpoints/step_000004")


@pytest.mark.parametrize("mode", ["true", "false"], ids=["async", "sync"])
def test_a_file_that_may_not_grow_stops_the_run(warm, mode):
    directory = warm()
    process = RunProcess(directory, f"run.async_checkpoints={mode}", max_file_bytes=400_000)
    assert process.wait() == 1
    assert "cannot be written" in process.said() and "Traceback" not in process.said(), process.said()
    assert "File too large" in process.said(), process.said()
    assert sorted(path.name for path in (directory / "checkpoints").iterdir()) == ["best.json", "initial"]


def test_a_truncated_checkpoint_is_named_and_the_one_before_goes_on(finished, warm):
    directory = warm()
    assert RunProcess(directory).wait() == 0
    damaged = directory / "checkpoints/step_000004/__0_0.distcp"
    os.truncate(damaged, damaged.stat().st_size // 2)
    again = RunProcess(directory)
    assert again.wait() == 0, again.said()
    assert "checkpoint step_000004 is damaged: __0_0.distcp has" in again.said()
    assert "resumed from checkpoint step_000002" in again.said()
    assert metrics_of(directory) == metrics_of(finished)


def test_pass_rates_belong_to_the_data_that_they_were_estimated_from(warm, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"question": f"Compute {i}+1.", "gold_answer": str(i + 1)}) for i in range(12)]
    prompts.write_text("\n".join(lines) + "\n")
    directory = warm()
    arguments = (f"data.train={prompts}", "data.pass_rate={samples: 4, max_prompts: null}", "run.num_steps=1")
    assert RunProcess(directory, *arguments).wait() == 0
    rates = (directory / "pass_rates.jsonl").read_text()
    assert len(rates.splitlines()) == 12
    prompts.write_text("\n".join(lines[1:]) + "\n")
    changed = RunProcess(directory, *arguments)
    assert changed.wait() == 1
    assert f"{directory}/pass_rates.jsonl:1: was estimated from other data" in changed.said()
    prompts.write_text("\n".join(lines) + "\n")
    assert RunProcess(directory, *arguments).wait() == 0
    assert (directory / "pass_rates.jsonl").read_text() == rates


def test_a_checkpoint_takes_no_other_prompts(warm, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"question": f"Compute {i}+1.", "gold_answer": str(i + 1)}) for i in range(12)]
    prompts.write_text("\n".join(lines) + "\n")
    directory = warm()
    assert RunProcess(directory, f"data.train={prompts}", "run.num_steps=1").wait() == 0
    prompts.write_text("\n".join([lines[0].replace('"1"', '"2"'), *lines[1:]]) + "\n")
    changed = RunProcess(directory, f"data.train={prompts}", "run.num_steps=1")
    assert changed.wait() == 1
    assert "the checkpoint's prompt stream is of other data (12 prompts with fingerprint" in changed.said()


def test_a_reward_model_starts_from_another_runs_checkpoint(finished, warm, single_process):
    directory = warm()
    source = finished / "checkpoints/step_000004"
    process = RunProcess(directory, f"model.reward_model={source}", "run.num_steps=1",
                "optimizer.reward_model.lr=1e-30",
                "optimizer.reward_model.min_lr=0.0", "optimizer.reward_model.weight_decay=0.0")  # fmt: skip
    assert process.wait() == 0, process.said()
    start, end = content_of(source), content_of(directory / "checkpoints/step_000001")
    weights = [name for name in start if name.startswith(("/reward_model.decoder.", "/reward_model.output_layer."))]
    assert "/reward_model.output_layer.weight" in weights and all(start[name] == end[name] for name in weights)
    for wrong, message in (
        (finished / "checkpoints/initial", "does not fit this run's model"),
        (finished / "nowhere", "there is no checkpoint directory"),
    ):
        refused = RunProcess(warm(wrong.name + "_"), f"model.reward_model={wrong}")
        assert refused.wait() == 1
        assert "error: model.reward_model: " in refused.said() and message in refused.said()
