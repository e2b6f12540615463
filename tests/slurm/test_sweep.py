"""A sweep through hydra's submitit launcher: an array of jobs, a run each, several processes each."""

from __future__ import annotations

import importlib.util

import pytest

from tests.slurm.conftest import has_steps
from tests.tiny import TINY, command_line, metrics_of

pytestmark = [pytest.mark.slurm, pytest.mark.end_to_end, pytest.mark.slow, pytest.mark.timeout(1200)]


def test_a_sweep_is_a_job_a_run(slurm, tmp_path):
    if importlib.util.find_spec("hydra_plugins.hydra_submitit_launcher") is None:
        pytest.skip("hydra-submitit-launcher is not installed: pip install '.[sweeps]'")
    outcome = command_line(
        "-m",
        *TINY,
        "hydra/launcher=slurm",
        "hydra.launcher.tasks_per_node=2",
        "cluster=single_machine_test",
        "resources.trainer_devices=2",
        "run.seed=0,1",
        "run.num_steps=2",
        f"hydra.sweep.dir={tmp_path}",
        f"run.dir={tmp_path}/seed_${{run.seed}}",
        timeout=1000,
    )
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    first, second = (tmp_path / f"seed_{seed}" for seed in (0, 1))
    assert has_steps(first, 2) and has_steps(second, 2)
    assert metrics_of(first) != metrics_of(second)
    # The results are there a little before the jobs have ended.
    (array,) = {path.name.split("_")[0] for path in (tmp_path / ".submitit").glob("[0-9]*")}
    slurm.until(lambda: slurm("scontrol", "--oneliner", "show", "job", array).count("JobState=COMPLETED") == 2)
