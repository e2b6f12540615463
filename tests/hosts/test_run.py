"""Whole runs over three hosts: two replicas of the trainer on a host each, SGLang servers on the third.

Processes and names are those of a job: `oreal_megatron.cli.serve` on the servers' host, and ranks that are told the
first host's name.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
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
    """A run of two ranks, on a host each, with a server on each of `servers`."""

    def __init__(self, network: Network, directory: Path, *options: str, servers: Sequence[str] = ("nodec",)):
        self.network, self.directory = network, directory
        number = f"rollout.sglang.num_servers={len(servers)}"
        self._options = (*TINY, *OPTIONS, number, *options, f"run.dir={directory}")
        self._logs, self._servers = directory.with_name("logs"), servers
        self._urls = self._logs / "urls"
        self._urls.mkdir(parents=True)
        self._said = 0
        for name in servers:
            self.serve(name)
        wait_until(lambda: len(list(self._urls.glob("*.url"))) == len(servers), 120)
        self._attached = ",".join(path.read_text().strip() for path in sorted(self._urls.glob("*.url")))
        self.ranks = [self._start_rank(rank) for rank in range(2)]

    def serve(self, name: str) -> None:
        """Starts the server of a host."""
        command = [
            "env",
            "OREAL_TRAINERS=nodea,nodeb",
            sys.executable,
            "-m",
            "oreal_megatron.cli.serve",
            "--host",
            name,
        ]
        place = [f"--node={self._servers.index(name)}", f"--nodes={len(self._servers)}"]
        arguments = [*place, "--announce", str(self._urls), *self._options]
        self.network[name].start(*command, *arguments, log=self._logs / f"serve_{name}")

    def _start_rank(self, rank: int) -> subprocess.Popen[bytes]:
        variables = [f"RANK={rank}", "LOCAL_RANK=0", "WORLD_SIZE=2", "MASTER_ADDR=nodea", "MASTER_PORT=4100"]
        command = [sys.executable, "-m", "oreal_megatron.cli.train", *self._options]
        host = self.network[("nodea", "nodeb")[rank]]
        attached = f"rollout.sglang.urls=[{self._attached}]"
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


@pytest.mark.parametrize(
    ("transport", "seconds"), [("direct", 6), pytest.param("broadcast", 20, marks=pytest.mark.slow)]
)
def test_a_link_that_is_cut_for_a_while_costs_time_alone(network, nodec, warm, transport, seconds):
    """In generation and in a publication; no response is lost, no server, and every step trains."""
    job = Job(network, warm(), f"rollout.sglang.transport={transport}", "run.num_steps=4")
    for event in (GENERATES.format(version=1), PUBLISHES):
        job.wait_for(event)
        nodec.cut()
        time.sleep(seconds)
        network.restore(nodec)
    assert job.ended() == [0, 0], job.all_logs()
    steps = metrics_of(job.directory)
    assert len(steps) == 4 and all(step["skipped"] is None for step in steps), steps
    assert "rollout server 0 lost" not in job.log() and " failed" not in job.log()


@pytest.mark.slow
def test_a_run_goes_on_without_a_host_that_dies_until_it_is_back(network, nodec, warm):
    """The host of a server loses power in generation; its server comes back under the same address."""
    options = ("run.num_steps=1000", "rollout.sglang.port=30400", "rollout.sglang.health_seconds=10.0")
    job = Job(network, warm(), *options, servers=("nodec", "nodeb"))
    job.wait_for(GENERATES.format(version=1))
    nodec.cut()
    nodec.kill_processes()
    job.wait_for("rollout server 0 lost")
    network.restore(nodec)
    job.serve("nodec")
    job.wait_for("rollout server 0 updating: ")
    job.wait_for("rollout server 0 connected: ")
    num_steps = len(metrics_of(job.directory))
    wait_until(lambda: len(metrics_of(job.directory)) > num_steps + 1, 120)
    for rank in job.ranks:
        rank.send_signal(signal.SIGTERM)
    assert job.ended() == [75, 75], job.all_logs()
    steps = metrics_of(job.directory)
    assert all(step["skipped"] is None for step in steps)
    served = [step["metrics"]["publication/servers"] for step in steps[1:]]  # the first updates no policy
    assert served[0] == served[-1] == 2 and min(served) == 1, served


@pytest.mark.slow
def test_connections_that_a_host_forgets_cost_their_requests_time_alone(network, nodec, warm):
    """Half-open connections in generation: the host of a server loses their state, closes none, and answers again."""
    options = ("run.num_steps=3", "rollout.sglang.port=30400", "rollout.sglang.health_seconds=300.0")
    job = Job(network, warm(), *options, servers=("nodec", "nodeb"))
    job.wait_for(GENERATES.format(version=1))
    # More connections than any control request has.
    wait_until(lambda: len(nodec.output("ss", "-Htn", "state", "established", "sport = :30400").splitlines()) > 4, 120)
    nodec.cut()
    nodec.forget_connections()
    network.restore(nodec)
    # Health checks go on by connections of their own, so nothing but TCP's probes can tell.
    job.wait_for("rollout server 0 lost")
    job.wait_for("rollout server 0 connected: ")
    assert job.ended() == [0, 0], job.all_logs()
    steps = metrics_of(job.directory)
    assert len(steps) == 3 and all(step["skipped"] is None for step in steps), steps
