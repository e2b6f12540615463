"""The real trainer under the real SLURM: submitted by command, stopped by signal, queued again, resumed."""

from __future__ import annotations

from pathlib import Path

import pytest

from oreal_megatron.overrides import literal
from tests.slurm.conftest import has_steps, oreal_submit, submitted_job
from tests.tiny import TINY, invoke, metrics_of

pytestmark = [pytest.mark.slurm, pytest.mark.end_to_end]

# What a slow machine's job needs: two processes of two nodes, one imagined GPU each.
SITE = (
    "cluster=single_machine_test",
    "cluster.cpus_per_node=2",
    "resources.trainer_devices=2",
    "resources.devices_per_node=1",
    "run.async_checkpoints=false",
)


def submitted_run(directory: Path, *overrides: str) -> str:
    return submitted_job(
        oreal_submit(
            *TINY, *SITE, *overrides, f"run.dir={literal(str(directory))}", "--nodes=2", tmp_path=directory.parent
        )
    )


def assert_resumed(slurm, job: str, directory: Path, *overrides: str, timeout: float = 240) -> str:
    """The job queued itself again once, and its run is what an uninterrupted one is; the job's log."""
    ended = slurm.ended(job, timeout=timeout)
    log = (directory / "slurm" / f"job-{job}.log").read_text()
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), log
    whole = directory.parent / "whole"
    assert invoke(*overrides, f"run.dir={whole}", num_processes=2).returncode == 0
    assert metrics_of(directory) == metrics_of(whole)
    return log


def test_a_run_stopped_by_a_signal_resumes_to_the_same_figures(slurm, tmp_path):
    directory = tmp_path / "stopped (a=b, c) #1 ~é %t"
    job = submitted_run(directory)
    slurm.until(lambda: has_steps(directory, 1))
    slurm("scancel", "--batch", "--signal=USR1", job)
    assert "status 75; queued again" in assert_resumed(slurm, job, directory)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_time_limit_comes_and_the_run_goes_on_to_the_same_figures(slurm, tmp_path):
    """SLURM's own signal, a minute before the limit: which is brought near once the run is under way."""
    directory = tmp_path / "limited"
    longer = ("run.num_steps=150", "run.checkpoint_every=50", "evaluation.every=75")
    job = submitted_run(directory, "cluster.time_limit=00:30:00", "cluster.signal_seconds=60", *longer)
    slurm.until(lambda: has_steps(directory, 1), timeout=600)
    hours, minutes, _ = map(int, slurm.job(job)["RunTime"].split(":"))
    slurm("scontrol", "update", f"JobId={job}", f"TimeLimit={60 * hours + minutes + 2}")
    slurm.until(lambda: slurm.job(job).get("Restarts") == "1", timeout=600)
    assert not has_steps(directory, 150)
    # The second job has all the time that it needs.
    slurm("scontrol", "update", f"JobId={job}", "TimeLimit=00:30:00")
    log = assert_resumed(slurm, job, directory, *longer, timeout=900)
    assert "USR1: the trainer is asked to save" in log and "status 75; queued again" in log


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_preempted_run_comes_back_to_the_same_figures(slurm, tmp_path):
    directory = tmp_path / "preempted"
    longer = ("run.num_steps=30", "run.checkpoint_every=10", "evaluation.every=15")
    job = submitted_run(directory, *longer)
    slurm.until(lambda: has_steps(directory, 1))
    urgent = slurm(
        "sbatch", "--parsable", "--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"
    )
    log = assert_resumed(slurm, job, directory, *longer, timeout=900)
    assert "the trainer is asked to save" in log
    assert slurm.job(urgent)["JobState"] == "COMPLETED"


def test_a_submission_that_cannot_work_is_refused(slurm, tmp_path):
    wrong = oreal_submit("experiment=oreal_32b", "cluster=single_machine_test", tmp_path=tmp_path)
    assert wrong.returncode == 1
    for part in (
        "model.path = 'models/OREAL-32B-SFT'",
        "data.train = 'data/oreal_rl_prompts.jsonl'",
        "resources.trainer_devices = 128",
    ):
        assert part in wrong.stderr
    # A layout that does not divide, too many nodes, no account, a path that is not shared, FP8 on A100: all at once.
    wrong = oreal_submit(
        "experiment=oreal_32b_disaggregated",
        "resources=a100",
        "cluster=single_machine_test",
        "parallel.tensor=3",
        "cluster.account=???",
        "cluster.shared=[/proc]",
        "fp8=blockwise",
        tmp_path=tmp_path,
    )
    assert wrong.returncode == 1
    for part in (
        "parallel.tensor = 3",
        "resources.trainer_devices = 64",
        "cluster.account = '???'",
        "run.dir = ",
        "fp8.policy.recipe = 'blockwise'",
    ):
        assert part in wrong.stderr
    partition = oreal_submit(*TINY, *SITE, "cluster.partition=nowhere", "--test-only", tmp_path=tmp_path)
    assert "cluster.partition = 'nowhere'" in partition.stderr
    cards = oreal_submit(*TINY, "cluster=single_machine_test", "resources.devices_per_node=16", tmp_path=tmp_path)
    assert "resources.devices_per_node" in cards.stderr
    # What SLURM alone knows it says itself, before anything is queued.
    feature = oreal_submit(*TINY, *SITE, "cluster.constraint=none_has_it", "--nodes=2", tmp_path=tmp_path)
    assert feature.returncode == 1 and "SLURM refuses" in feature.stderr and "feature" in feature.stderr
    assert slurm("squeue", "--noheader") == ""
