"""The probe against real processes: packages with misleading names, and imports that end the process."""

from __future__ import annotations

from pathlib import Path

import pytest

from oreal_megatron.machine.probe import probe


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A directory whose packages the probe's processes see first."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).resolve().parents[3]}")
    return tmp_path


def package(site: Path, name: str, code: str = "") -> None:
    (site / name).mkdir()
    (site / name / "__init__.py").write_text(code)


def test_apex_of_another_project_is_not_nvidias(site):
    package(site, "apex")
    found = probe(["apex"])
    assert found.torch.found is not None
    assert found.apex.found is None
    assert "is not NVIDIA's" in found.apex.problem and str(site / "apex") in found.apex.problem


def test_probe_survives_crashes_and_exits(site):
    package(site, "transformer_engine", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    package(site, "amp_C")
    package(site, "fused_weight_gradient_mlp_cuda", "raise SystemExit(3)")
    found = probe(["transformer_engine", "apex", "sglang"])
    assert "died of signal 11" in found.transformer_engine.problem
    assert found.apex.found is None and "ended with 3" in found.apex.problem
    assert found.torch.found is not None
    assert found.sglang.found is not None or "PackageNotFoundError" in found.sglang.problem


def test_transformer_engine_that_megatron_replaced_does_not_count(site, monkeypatch):
    stand_in = Path(__file__).resolve().parents[2] / "transformer_engine_stand_in"
    monkeypatch.setenv("PYTHONPATH", f"{stand_in}:{Path(__file__).resolve().parents[3]}")
    found = probe(["transformer_engine"]).transformer_engine
    # It imports and has layers, but not the matrix products that Megatron-Core imports from it.
    assert found.found is None
    assert found.problem.startswith("ImportError: Megatron-Core cannot use 2.11.0")


def test_transformer_engine_without_layers_does_not_count(site):
    package(site, "transformer_engine", '__version__ = "2.11.0"')
    package(site, "transformer_engine/pytorch", "Linear = None")
    found = probe(["transformer_engine"])
    assert found.transformer_engine.found is None and "2.11.0 at" in found.transformer_engine.problem
