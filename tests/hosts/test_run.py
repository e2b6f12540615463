"""Whole runs over three hosts: two replicas of the trainer on a host each, SGLang servers on the third.

Processes and names are those of a job: `oreal_megatron.cli.serve` on the servers' host, and ranks that are told the
first host's name.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.hosts.network import Network
from tests.run_processes import wait_until
from tests.servers.conftest import require_sglang
from tests.tiny import TINY, metrics_of

pytestmark = [pytest.mark.hosts, pytest.mark.servers, pytest.mark.end_to_end, pytest.mark.timeout(1200)]

OPTIONS = (
    "rollout=sglang_cpu",
    "rollout.sglang.startup_seconds=900.0",
    "tracking.log_level=DEBUG",
    "evaluation=none",
    "evaluation.every=0",
    "run.checkpoint_every=0",
    "run.threads=1",
)
PUBLISHES = "rollout server 0 updating: "
GENERATES = "rollout server 0 connected: weights {version}-"


@pytest.fixture(autouse=True)
def _sglang() -> None:
    require_sglang()


class Job:
    """A run of two ranks with one server, on three hosts."""

    def __init__(self, network: Network, directory: Path, *options: str):
        self.network, self.directory = network, directory
        self._options = (*TINY, *OPTIONS, *options, f"run.dir={directory}")
        self._logs = directory.with_name("logs")
        self._logs.mkdir()
        self._said = 0
        self.serve()
        announced = self._logs / "urls" / "server_0000.url"
        wait_until(lambda: announced.is_file() and announced.read_text(), 120)
        self.url = announced.read_text().strip()
        self.ranks = [self._start_rank(rank) for rank in range(2)]

    def serve(self) -> None:
        """Starts the servers of the third host."""
        urls = self._logs / "urls"
        urls.mkdir(exist_ok=True)
        command = ["env", "MASTER_ADDR=nodea", sys.executable, "-m", "oreal_megatron.cli.serve", "--host", "nodec"]
        arguments = ["--announce", str(urls), *self._options]
        self.network["nodec"].start(*command, *arguments, log=self._logs / "serve")

    def _start_rank(self, rank: int) -> subprocess.Popen[bytes]:
        variables = [f"RANK={rank}", "LOCAL_RANK=0", "WORLD_SIZE=2", "MASTER_ADDR=nodea", "MASTER_PORT=4100"]
        command = [sys.executable, "-m", "oreal_megatron.cli.train", *self._options]
        host = self.network[("nodea", "nodeb")[rank]]
        attached = f"rollout.sglang.urls=[{self.url}]"
        return host.start("env", *variables, *command, attached, log=self._logs / f"rank_{rank}")

    def log(self) -> str:
        """Log lines of rank 0."""
        path = self.directory / "logs" / "rank_0000.log"
        return path.read_text() if path.is_file() else ""

    def all_logs(self) -> str:
        return "\n".join(f"== {path}\n{path.read_text()[-3000:]}" for path in self._logs.iterdir() if path.is_file())

    def wait_for(self, line: str) -> float:
        """Waits for the next log line of rank 0 that has a text; returns the seconds that this took."""
        start = time.monotonic()
        while (found := self.log().find(line, self._said)) < 0:
            assert self.ranks[0].poll() is None, self.all_logs()
            assert time.monotonic() < start + 600, self.all_logs()
            time.sleep(0.002)
        self._said = found + len(line)
        return time.monotonic() - start

    def ended(self) -> list[int]:
        """Waits for the ranks; returns their exit statuses."""
        return [rank.wait(600) for rank in self.ranks]


@pytest.mark.parametrize("transport", ["direct", pytest.param("broadcast", marks=pytest.mark.slow)])
def test_a_link_that_is_cut_for_a_while_costs_time_alone(network, nodec, warm, transport):
    """In generation and in a publication; no response is lost, no server, and every step trains."""
    job = Job(network, warm(), f"rollout.sglang.transport={transport}", "run.num_steps=4")
    seconds = 8
    for event in (GENERATES.format(version=1), PUBLISHES):
        job.wait_for(event)
        nodec.cut()
        time.sleep(seconds)
        network.restore(nodec)
    assert job.ended() == [0, 0], job.all_logs()
    steps = metrics_of(job.directory)
    assert len(steps) == 4 and all(step["skipped"] is None for step in steps), steps
    assert "rollout server 0 lost" not in job.log() and " failed" not in job.log()
