"""Two roles for real: the trainer, and SGLang servers on nodes of their own, in one job of the real SLURM."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.servers.conftest import require_sglang
from tests.slurm.conftest import oreal_submit, submitted_job
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


def steps_of(directory: Path) -> list[dict]:
    lines = (directory / "metrics.jsonl").read_text().splitlines() if (directory / "metrics.jsonl").exists() else []
    return [record for record in map(json.loads, lines) if record["kind"] == "step"]


def all_logs(directory: Path) -> str:
    return "\n".join(f"== {path}\n{path.read_text()[-3000:]}" for path in sorted((directory / "slurm").rglob("*.log")))


def processes_of(directory: Path) -> list[str]:
    """Ids of the servers that a run's job has started."""
    found = subprocess.run(["pgrep", "-f", f"sglang.launch_server.*{directory}"], capture_output=True, text=True).stdout
    return found.split()


def test_a_trainer_and_a_server_on_nodes_of_their_own(slurm, tmp_path):
    """Submitted, trained on the server's rollouts, and nothing is left of it."""
    directory = tmp_path / "runs" / "roles"
    job = submitted_job(oreal_submit(*TINY, *SITE, "run.num_steps=2", f"run.dir={directory}", tmp_path=tmp_path))
    ended = slurm.ended(job, timeout=1500)
    assert ended["JobState"] == "COMPLETED", all_logs(directory)
    assert ended["NumNodes"] == "2"
    assert [record["step"] for record in steps_of(directory)] == [0, 1]
    log = (directory / "slurm" / f"job-{job}.log").read_text()
    assert "trainer on node1, servers on node2" in log
    # Weights were published to that very server after each update.
    assert "http://node2:" in (directory / "slurm" / f"logs-{job}" / "servers_node_0.log").read_text()
    assert processes_of(directory) == []
