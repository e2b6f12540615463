"""`resources.device=cpu` and plans use the CPU on a machine on which torch sees a GPU: tests/cuda_stand_in."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from oreal_megatron.compose import composed, validated
from oreal_megatron.config import ConfigError
from oreal_megatron.distributed.environment import devices_hidden
from oreal_megatron.preflight import check_startable
from oreal_megatron.servers.server_process import launch_environment
from oreal_megatron.workspace import check_device
from tests.conftest import ROOT
from tests.tiny import TINY, metrics_of

GPU = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"} | {
    "PYTHONPATH": os.pathsep.join([str(ROOT / "tests" / "cuda_stand_in"), str(ROOT)]),
    "OMP_NUM_THREADS": "1",
}
ON_H100 = ("experiment=arithmetic", "resources=h100", "resources.trainer_devices=2", "parallel.tensor=2")


def with_gpu(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command of Python on a machine with the stand-in for a GPU."""
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env=GPU | environment, timeout=300
    )


def succeeded(outcome: subprocess.CompletedProcess[str]) -> str:
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    return outcome.stdout


def test_stand_in_is_a_device_until_it_is_hidden():
    ask = "import torch; print(torch.cuda.is_available(), torch.cuda.device_count())"
    assert succeeded(with_gpu("-c", ask)) == "True 1\n"
    assert succeeded(with_gpu("-c", ask, CUDA_VISIBLE_DEVICES="")) == "False 0\n"


@pytest.mark.end_to_end
def test_run_on_cpu_trains_on_the_cpu_of_a_machine_with_a_gpu(tmp_path):
    directory = tmp_path / "run"
    steps = ("run.num_steps=1", "objective.actor_freeze_steps=0", "tracking.report=false", "evaluation.every=5")
    succeeded(with_gpu("-m", "oreal_megatron.cli.train", *TINY, *steps, f"run.dir={directory}"))
    (step,) = [record for record in metrics_of(directory) if record["kind"] == "step"]
    assert step["metrics"]["reward_model/grad_norm"] > 0


@pytest.mark.end_to_end
def test_submission_with_its_plan_on_a_login_node_with_a_gpu(tmp_path):
    """The job does not inherit the variable that hides GPUs from the plan."""
    sbatch = tmp_path / "sbatch"
    sbatch.write_text('#!/bin/sh\necho "devices: ${CUDA_VISIBLE_DEVICES-all}"\n')
    sbatch.chmod(0o755)
    site = ("cluster=single_machine_test", "cluster.gpu_request=none", f"run.dir={tmp_path / 'run'}")
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    shown = succeeded(with_gpu("-m", "oreal_megatron.cli.submit", *ON_H100, *site, "--test-only", PATH=path))
    assert "fits: " in shown and "devices: all" in shown


def configured(*overrides: str) -> Any:
    return validated(composed(["experiment=arithmetic", *overrides]))


def test_device_of_the_process_must_be_the_configured_one(monkeypatch):
    """CUDA answers once: a second run of a sweep in the same process may find the other kind of device."""
    check_device("cpu")
    with pytest.raises(ConfigError, match=r"resources.device = 'h100_80gb'.*no GPU.*hydra/launcher=slurm"):
        check_device("h100_80gb")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    check_device("h100_80gb")
    with pytest.raises(ConfigError, match=r"resources.device = 'cpu'.*sees a GPU"):
        check_device("cpu")


def test_launched_servers_on_gpus_are_refused_where_the_run_sees_none():
    with pytest.raises(ConfigError, match=r"rollout.sglang.device = 'cuda'.*rollout=sglang_cpu"):
        check_startable(configured("rollout=sglang"), 1)


def test_servers_on_cpu_see_no_gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    for device, seen in (("cpu", ""), ("cuda", "0,1")):
        servers = configured("rollout=sglang_cpu", "rollout.sglang.python=/usr/bin/python3").rollout.sglang
        found = launch_environment(servers.model_copy(update={"device": device}), imports=Path(tmp_path))
        assert found["CUDA_VISIBLE_DEVICES"] == seen


@pytest.mark.parametrize("before", [None, "2"])
def test_hidden_devices_come_back(monkeypatch, before):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if before is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", before)
    with devices_hidden(when=False):
        assert os.environ.get("CUDA_VISIBLE_DEVICES") == before
    with pytest.raises(ValueError, match="inside"), devices_hidden():
        assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
        raise ValueError("inside")
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == before
