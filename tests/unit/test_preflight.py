"""What a run lacks is said before it begins, with the key and a remedy that can be typed."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from oreal_megatron.compose import composed, validated
from oreal_megatron.config import ConfigError
from oreal_megatron.preflight import check_startable


def test_missing_sglang_is_refused_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = validated(composed(["experiment=arithmetic", "rollout=sglang"]))
    with pytest.raises(ConfigError) as refused:
        check_startable(config, 1)
    (found,) = [violation for violation in refused.value.violations if violation.key == "rollout.backend"]
    assert "pip install '.[sglang]'" in found.remedy and "rollout=embedded" in found.remedy
    shown = io.StringIO()
    Console(file=shown, width=500).print(str(refused.value), markup=False)
    assert "'.[sglang]'" in shown.getvalue()


def test_missing_sglang_of_servers_on_a_cpu_names_its_own_command(monkeypatch, tmp_path):
    monkeypatch.setattr("oreal_megatron.servers.server_process._CPU_SGLANG", tmp_path)
    config = validated(composed(["experiment=arithmetic", "rollout=sglang_cpu"]))
    with pytest.raises(ConfigError, match="make sglang-deps"):
        check_startable(config, 1)
