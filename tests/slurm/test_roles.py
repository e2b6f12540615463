"""Two roles for real: the trainer, and SGLang servers on nodes of their own, in one job of the real SLURM."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.servers.conftest import require_sglang
from tests.slurm.conftest import all_logs, has_steps, oreal_submit, processes, submitted_job
from tests.tiny import TINY

pytestmark = [pytest.mark.slurm, pytest.mark.servers, pytest.mark.end_to_end, pytest.mark.timeout(1800)]

# A trainer of one process on node1; servers of one process each on the nodes after it.
SITE = (
    "cluster=single_machine_test",
    "cluster.cpus_per_node=2",
    "resources.trainer_devices=1",
    "resources.devices_per_node=1",
    "rollout=sglang_cpu",
    "rollout.sglang.startup_seconds=900",
    "run.async_checkpoints=false",
)


@pytest.fixture(autouse=True)
def with_sglang() -> None:
    require_sglang()


def submitted_roles(directory: Path, *arguments: str) -> str:
    return submitted_job(oreal_submit(*TINY, *SITE, *arguments, f"run.dir={directory}", tmp_path=directory.parent))


def assert_completed(slurm, job: str, directory: Path) -> str:
    """The job's log."""
    ended = slurm.ended(job, timeout=1500)
    assert ended["JobState"] == "COMPLETED", all_logs(directory)
    assert processes("sglang.launch_server", directory) == []
    return (directory / "slurm" / f"job-{job}.log").read_text()


def test_a_run_goes_on_without_a_server_until_that_is_back(slurm, tmp_path):
    directory = tmp_path / "lost"
    job = submitted_roles(directory, "rollout.sglang.num_servers=2", "run.num_steps=8")
    slurm.until(lambda: has_steps(directory, 1), timeout=1200)
    logs = directory / "slurm" / f"logs-{job}"
    url = next(logs.glob("servers.0/server_0000.url")).read_text().strip()
    assert url.startswith("http://node2:"), url
    os.kill(processes(f"--port {url.rsplit(':', 1)[1]}", directory)[0], signal.SIGKILL)
    assert_completed(slurm, job, directory)
    assert has_steps(directory, 8)
    assert "server 0 ended with status" in (logs / "servers_node_0.log").read_text()
    assert "ended" not in (logs / "servers_node_1.log").read_text()
    assert "rollout server 0 lost: " in (logs / "trainer_rank_0.log").read_text()


@pytest.mark.slow
def test_trainer_that_dies_ends_servers_and_gives_its_status(slurm, tmp_path):
    directory = tmp_path / "killed"
    job = submitted_roles(directory, "run.num_steps=50")
    slurm.until(lambda: has_steps(directory, 1), timeout=1200)
    # The shell around it, which notes how it ends, has the same arguments.
    os.kill(processes("bin/oreal-train experiment", directory)[-1], signal.SIGKILL)
    ended = slurm.ended(job)
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "137:0"), all_logs(directory)
    assert processes("sglang.launch_server", directory) == []


@pytest.mark.slow
def test_scancel_leaves_no_process(slurm, tmp_path):
    directory = tmp_path / "cancelled"
    job = submitted_roles(directory, "run.num_steps=50")
    slurm.until(lambda: has_steps(directory, 1), timeout=1200)
    slurm("scancel", job)
    assert slurm.ended(job)["JobState"] == "CANCELLED"
    slurm.until(lambda: processes("", directory) == [], timeout=60)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "nodes", "servers"),
    [("oreal_32b_disaggregated", 1, 1), ("oreal_32b_disaggregated", 2, 2), ("oreal_32b", 2, 2)],
)
def test_the_dry_run_of_32b_trains_with_servers(slurm, tmp_path, recipe, nodes, servers):
    """Trainer of TP2 x PP2 x DP2 with two servers of TP2, apart on 2 and 4 nodes, and on the same 2; stopped and
    resumed on the way where that costs least."""
    directory = tmp_path / "dry"
    arguments = (f"experiment={recipe}", "cluster=single_machine_test", "run.dry_run=true", "tracking.console=plain")
    spread = (f"--nodes={nodes}", f"--server-nodes={servers}")
    outcome = oreal_submit(*arguments, *spread, f"run.dir={directory}", tmp_path=tmp_path)
    job = submitted_job(outcome)
    assert "rollout.sglang.tensor 8 becomes 2" in outcome.stdout
    if recipe == "oreal_32b":
        slurm.until(lambda: has_steps(directory, 1), timeout=1500)
        slurm("scancel", "--batch", "--signal=USR1", job)
    log = assert_completed(slurm, job, directory)
    assert has_steps(directory, 2)
    shared = recipe == "oreal_32b"
    assert slurm.job(job)["NumNodes"] == str(nodes + (0 if shared else servers))
    assert ("queued again" in log) == shared
