"""The doctor on this machine: what an experiment lacks, and the exact command that installs it."""

from __future__ import annotations

import functools

import pytest

from oreal_megatron.cli.doctor import main
from oreal_megatron.machine import doctor


def test_tasks_of_srun_do_not_each_measure_all_devices(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(SystemExit) as ended:
        main(["experiment=arithmetic", "--measure", str(tmp_path / "figures.yaml")])
    assert ended.value.code == 1
    assert "srun has started 8 tasks" in capsys.readouterr().err


@pytest.mark.end_to_end
def test_doctor_names_what_is_missing_and_its_installation(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "probe", functools.cache(doctor.probe))
    asked = ["experiment=oreal_32b", "fp8=blockwise", "parallel.fused_weight_gradients=true"]
    with pytest.raises(SystemExit) as ended:
        main(asked)
    assert ended.value.code == 1
    lines = {line[9:].split("  ")[0].strip(): line for line in capsys.readouterr().out.splitlines()}
    assert lines["torch"].startswith("found")
    for name in ("Transformer Engine", "model.implementation", "fp8.policy.recipe", "parallel.fused_weight_gradients"):
        assert any(key.startswith(name) and line.startswith("missing") for key, line in lines.items()), (name, lines)
    # Brackets are part of the command.
    assert "pip install --no-build-isolation 'transformer-engine[pytorch,core_cu" in str(lines)
    assert "pip install '.[sglang]'" in str(lines) or lines["SGLang"].startswith("found")
    # A run on CPU asks for no GPUs.
    with pytest.raises(SystemExit):
        main(["experiment=arithmetic"])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if " GPUs " in line]
    assert line.endswith("resources.device=cpu needs none")
