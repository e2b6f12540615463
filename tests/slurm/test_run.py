"""The real trainer under the real SLURM: submitted by command, stopped by signal, queued again, resumed."""

from __future__ import annotations

import pytest

from tests.slurm.conftest import oreal_submit, submitted_job
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


def test_a_run_stopped_by_a_signal_resumes_to_the_same_figures(slurm, tmp_path):
    directory = tmp_path / "runs" / "stopped"
    job = submitted_job(oreal_submit(*TINY, *SITE, f"run.dir={directory}", "--nodes=2", tmp_path=tmp_path))
    slurm.until(
        lambda: (directory / "metrics.jsonl").exists() and '"step"' in (directory / "metrics.jsonl").read_text()
    )
    slurm("scancel", "--batch", "--signal=USR1", job)
    ended = slurm.ended(job)
    log = (directory / "slurm" / f"job-{job}.log").read_text()
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), log
    assert "status 75; queued again" in log
    whole = tmp_path / "runs" / "whole"
    assert invoke(f"run.dir={whole}", num_processes=2).returncode == 0
    assert metrics_of(directory) == metrics_of(whole)


def test_a_submission_that_cannot_work_is_refused(slurm, tmp_path):
    wrong = oreal_submit("experiment=oreal_32b", "cluster=single_machine_test", tmp_path=tmp_path)
    assert wrong.returncode == 1
    for part in (
        "model.path = 'models/OREAL-32B-SFT': is not there",
        "data.train = 'data/oreal_rl_prompts.jsonl': is not there",
        "this is 16 nodes; partition batch has 4",
    ):
        assert part in wrong.stderr
    partition = oreal_submit(*TINY, *SITE, "cluster.partition=nowhere", "--test-only", tmp_path=tmp_path)
    assert "cluster.partition = 'nowhere': there are batch, urgent" in partition.stderr
    cards = oreal_submit(*TINY, "cluster=single_machine_test", "resources.devices_per_node=16", tmp_path=tmp_path)
    assert "nodes of batch have 8 GPUs" in cards.stderr


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("nodes", [2, 4])
def test_the_dry_run_of_32b_trains_on_the_cluster(slurm, tmp_path, nodes):
    """Eight processes: TP2 x PP2 x DP2 with sequence parallelism, recompute and the distributed optimizer."""
    directory = tmp_path / "runs" / "dry"
    job = submitted_job(
        oreal_submit(
            "experiment=oreal_32b",
            "cluster=single_machine_test",
            "run.dry_run=true",
            f"run.dir={directory}",
            "tracking.console=plain",
            f"--nodes={nodes}",
            tmp_path=tmp_path,
        )
    )
    assert slurm.ended(job, timeout=1500)["JobState"] == "COMPLETED"
    steps = [record for record in metrics_of(directory) if record["kind"] == "step"]
    assert [record["step"] for record in steps] == [0, 1]
