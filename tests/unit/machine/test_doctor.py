"""The doctor on this machine: what an experiment lacks, and the command that mends it, to the letter."""

from __future__ import annotations

import sys

import pytest

from oreal_megatron.cli.doctor import doctor


def test_it_says_what_is_missing_and_how_to_get_it(monkeypatch, capsys):
    asked = ["experiment=oreal_32b", "fp8=blockwise", "parallel.fused_weight_gradients=true"]
    monkeypatch.setattr(sys, "argv", ["oreal-doctor", *asked])
    with pytest.raises(SystemExit) as ended:
        doctor()
    assert ended.value.code == 1
    lines = {line[9:].split("  ")[0].strip(): line for line in capsys.readouterr().out.splitlines()}
    assert lines["torch"].startswith("there")
    for name in ("Transformer Engine", "model.implementation", "fp8.policy.recipe", "parallel.fused_weight_gradients"):
        assert any(key.startswith(name) and line.startswith("missing") for key, line in lines.items()), (name, lines)
    # Brackets are part of the command.
    assert "pip install --no-build-isolation 'transformer-engine[pytorch,core_cu" in str(lines)
    assert "pip install '.[sglang]'" in str(lines) or lines["SGLang"].startswith("there")
