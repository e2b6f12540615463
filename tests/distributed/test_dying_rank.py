"""A rank that fails or is killed ends the job, and what is to be read is its error, on top.

The limit is the one that docs/debugging.md states: torchrun ends the remaining ranks 30 s after SIGTERM at the latest,
and a collective waits for a rank that hangs for `parallel.timeout_seconds`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.tiny import TINY

pytestmark = pytest.mark.distributed
SECONDS_TO_END = 60
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]


def start(module: str, directory: Path, *overrides: str) -> subprocess.Popen[str]:
    command = [*TORCHRUN, module, *TINY, f"run.dir={directory}", "evaluation.benchmarks={}", *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def of_ranks(said: str) -> str:
    """What the ranks said, without what torchrun adds at the end."""
    return said.split("torch/distributed/elastic")[0]


def test_the_error_of_the_rank_that_failed_is_the_only_one(warm):
    job = start("tests.distributed.faulty_run", warm())
    said, _ = job.communicate(timeout=300)
    assert job.returncode != 0
    ranks = of_ranks(said)
    assert ranks.count("Traceback") == 1 and "RuntimeError: the device fell off the bus" in ranks, said
    assert "rank 0 stops: rank 1 failed" in said
    assert said.index("fell off the bus") < said.index("rank 0 stops")


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
def test_a_rank_that_is_killed_or_hangs_ends_the_job(warm, number):
    directory = warm()
    limit = "parallel.timeout_seconds=20"
    job = start("oreal_megatron.cli.train", directory, "parallel.tensor=2", "run.num_steps=1000", limit)
    while not (directory / "metrics.jsonl").exists():
        assert job.poll() is None, job.communicate()[0]
        time.sleep(0.2)
    ranks = {
        child.environ()["RANK"]: child for child in psutil.Process(job.pid).children() if "RANK" in child.environ()
    }
    ranks["1"].send_signal(number)
    said, _ = job.communicate(timeout=SECONDS_TO_END + (20 if number == signal.SIGSTOP else 0))
    assert job.returncode != 0 and not ranks["0"].is_running()
    assert "rank 0 stops: it lost contact with a rank that was killed or hangs" in said
    assert "Traceback" not in of_ranks(said), said
    assert number != signal.SIGKILL or "Signal 9 (SIGKILL)" in said, said
