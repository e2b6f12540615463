"""Weights point to point over NCCL, from one device to another, exactly."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_receiver_gets_its_shards_over_nccl(devices, dtype):
    devices(2)
    assert_published("nccl", dtype)


def assert_published(backend: str, dtype: str) -> None:
    """Two processes, a sender and a receiver; also over gloo, by the tests that need no GPU."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    worker = ["-m", "tests.gpu.transport_worker", backend, dtype]
    outcome = subprocess.run([*command, *worker], cwd=ROOT, env=dict(os.environ), capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr[-4000:]
