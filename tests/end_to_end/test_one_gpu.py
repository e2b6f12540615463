"""`make test-gpu-one` where there is no GPU: its checks on the CPU, and how it reports a check that goes wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT
from tests.gpu import one_gpu

pytestmark = pytest.mark.end_to_end


def one_gpu_on(device: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-m", "tests.gpu.one_gpu", "--device", device, *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_every_check_passes_on_a_cpu(tmp_path):
    path = tmp_path / "figures.json"
    found = one_gpu_on("cpu", "--small", "--output", str(path))
    assert found.returncode == 0, found.stdout
    report = json.loads(path.read_text())
    assert report["device"] == "cpu" and report["checks"].keys() == one_gpu.CHECKS.keys()
    assert report["checks"]["machine"]["figures"]["device"] == "CPU"
    assert [line.split()[:2] for line in found.stdout.splitlines()[:-1]] == [[name, "PASS"] for name in one_gpu.CHECKS]


def test_no_gpu_is_an_error_and_not_a_pass(tmp_path):
    found = one_gpu_on("cuda", "--output", str(tmp_path / "figures.json"))
    assert found.returncode == 2 and "torch sees no GPU" in found.stderr and "--device cpu" in found.stderr


def raises(small: bool) -> None:
    raise AssertionError("the figure is 7")


def dies(small: bool) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def hangs(small: bool) -> None:
    print("waits for a peer", flush=True)
    time.sleep(600)


@pytest.mark.parametrize(
    ("check", "limit", "problem"),
    [
        (raises, 60, "the figure is 7"),
        (dies, 60, "exit code -11"),
        (hangs, 1, "it took more than 1 s: waits for a peer"),
    ],
)
def test_a_check_that_goes_wrong_is_reported_with_its_reason(monkeypatch, check, limit, problem):
    monkeypatch.setitem(one_gpu.CHECKS, "wrong", (limit, check))
    found = one_gpu.outcome("wrong", "cpu", small=True)
    assert not found["passed"] and problem in found["problem"]
    assert "FAIL" in one_gpu.line("wrong", found) and "\n" not in one_gpu.line("wrong", found)


def test_checks_together_take_eight_minutes_at_most():
    assert sum(limit for limit, _ in one_gpu.CHECKS.values()) <= 480
