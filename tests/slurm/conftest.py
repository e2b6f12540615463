"""A real SLURM of four nodes on this machine, started for the session; without its daemons these tests skip."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from oreal_megatron.metrics import METRICS_FILE, read_metrics
from tests.hosts.network import Host

SCRIPTS = Path(__file__).resolve().parents[2] / "slurm" / "test_cluster"
FINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")


@dataclass(frozen=True)
class Slurm:
    """The running cluster."""

    environment: dict[str, str]

    def __call__(self, *command: str) -> str:
        for _ in range(3):  # a busy controller may hang up on a command, which then dies of SIGPIPE
            outcome = subprocess.run(command, capture_output=True, text=True, env=self.environment, timeout=60)
            if outcome.returncode != -signal.SIGPIPE:
                break
        assert outcome.returncode == 0, outcome.stderr
        return outcome.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        line = self("scontrol", "--oneliner", "show", "job", number)
        return dict(item.split("=", 1) for item in line.split() if "=" in item)

    def ended(self, number: str, timeout: float = 240) -> dict[str, str]:
        """The job when it is over, and not on its way to the queue again."""
        self.until(lambda: self.job(number)["JobState"] in FINAL, timeout)
        return self.job(number)

    def until(self, done: Callable[[], bool], timeout: float = 240) -> None:
        end = time.monotonic() + timeout
        while not done():
            assert time.monotonic() < end, self("squeue")
            time.sleep(0.3)


def missing_daemons() -> str | None:
    """Returns why this machine cannot have a SLURM cluster; None if it can."""
    if shutil.which("slurmctld", path=f"{os.environ['PATH']}:/usr/sbin") is None:
        return "slurmctld is not installed: make slurm-deps"
    return None


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    if (reason := missing_daemons()) is not None:
        pytest.skip(reason)
    if not os.access("/etc/hosts", os.W_OK):
        pytest.skip("/etc/hosts cannot be written: the nodes of the test cluster need names")
    # Unix sockets have short names only.
    base = tmp_path_factory.mktemp("slurm")
    started = subprocess.run([SCRIPTS / "up.sh", base, "4"], capture_output=True, text=True, timeout=120)
    assert started.returncode == 0, started.stderr
    os.environ["SLURM_CONF"] = str(base / "slurm.conf")
    try:
        yield Slurm({**os.environ, "OMP_NUM_THREADS": "1"})
    finally:
        subprocess.run([SCRIPTS / "down.sh", base], capture_output=True, timeout=120)
        del os.environ["SLURM_CONF"]


def oreal_submit(
    *arguments: str, tmp_path: Path, environment: Mapping[str, str] = os.environ, host: Host | None = None
) -> subprocess.CompletedProcess[str]:
    """`oreal-submit`, whose jobs find `oreal-train` beside this Python. host: where it runs; None: this machine."""
    command = [sys.executable, "-m", "oreal_megatron.cli.submit", *arguments]
    return subprocess.run(
        command if host is None else host.command(*command),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
        env={**environment, "OMP_NUM_THREADS": "1"},
    )


def submitted_job(outcome: subprocess.CompletedProcess[str]) -> str:
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    found = re.search(r"submitted job (\d+)", outcome.stdout)
    assert found is not None, outcome.stdout
    return found[1]


def has_steps(directory: Path, count: int) -> bool:
    """Whether a run has finished so many steps."""
    return (directory / METRICS_FILE).exists() and len(read_metrics(directory)[0]) >= count


def all_logs(directory: Path) -> str:
    return "\n".join(f"== {path}\n{path.read_text()[-3000:]}" for path in sorted((directory / "slurm").rglob("*.log")))


def processes(program: str, directory: Path) -> list[int]:
    """Of the run's job, the oldest first: those of the program that name its directory."""
    found = subprocess.run(["pgrep", "-a", "-f", str(directory)], capture_output=True, text=True).stdout
    return [int(line.split()[0]) for line in found.splitlines() if program in line]
