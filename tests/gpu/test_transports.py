"""Weights from one device to another over NCCL, and through a device's memory by CUDA's IPC handles, exactly."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.distributed.test_publication import assert_published as publication
from tests.tiny_models import save_tiny


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_receiver_gets_its_shards_over_nccl(devices, dtype):
    devices(2)
    assert_published("nccl", dtype)


@pytest.mark.parametrize(("num_devices", "served"), [(1, "float32"), (1, "fp8"), (2, "bfloat16")])
def test_server_on_the_trainers_device_reads_by_ipc(devices, tmp_path, num_devices, served):
    """Audited by the workers, and every tensor compared; workers are processes of their own, as SGLang's are."""
    devices(num_devices)
    publish_by_ipc(tmp_path, num_devices, served, device="cuda")


def publish_by_ipc(tmp_path, world, served, *, device):
    """Also on a CPU, by the tests that need no GPU."""
    shape = {"hidden_size": 128, "ffn": 512, "head_dim": 64, "num_groups": 4}
    setting = {
        "layout": {"tensor": world, "pipeline": 1},
        "world": world,
        "served": served,
        "num_servers": 1,
        "server_ranks": world,
        "transports": ["ipc", "ipc"],
        "device": device,
        "bucket_bytes": 2**17,
    }
    publication(save_tiny(tmp_path / "model", "qwen3", tied=False, **shape), setting)


def assert_published(backend: str, dtype: str) -> None:
    """Two processes, a sender and a receiver; also over gloo, by the tests that need no GPU."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    worker = ["-m", "tests.gpu.transport_worker", backend, dtype]
    outcome = subprocess.run([*command, *worker], cwd=ROOT, env=dict(os.environ), capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr[-4000:]
