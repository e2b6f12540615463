"""What a run lacks is said before it begins, with the key and a remedy that can be typed."""

from __future__ import annotations

import io
import pickle
import socket

import pytest
from rich.console import Console

from oreal_megatron.cli.errors import run_command
from oreal_megatron.compose import composed, validated
from oreal_megatron.config import ConfigError, Violation
from oreal_megatron.preflight import check_startable, warn_of_uncorrected_tokens
from oreal_megatron.workspace import check_host


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


def violations_of_rank(rank: int, num_processes: int, monkeypatch, *urls: str) -> list[Violation]:
    """Of a run with the ipc transport to these servers."""
    monkeypatch.setenv("RANK", str(rank))
    urls_override = f"rollout.sglang.urls=[{','.join(repr(url) for url in urls)}]"
    servers = ["rollout=sglang", "rollout.sglang.device=cpu", "rollout.sglang.transport=ipc", urls_override]
    config = validated(composed(["experiment=arithmetic", *servers]))
    try:
        check_startable(config, num_processes)
    except ConfigError as error:
        return error.violations
    return []


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.1.1", "[::1]", "localhost", socket.gethostname()])
def test_servers_under_every_name_of_this_machine_share_its_memory(monkeypatch, host):
    assert violations_of_rank(0, 1, monkeypatch, f"http://{host}:30000") == []


@pytest.mark.parametrize("host", ["192.0.2.7", "a" * 64, "a..b"])
def test_rank_that_would_share_memory_with_a_server_elsewhere_is_refused(monkeypatch, host):
    urls = ("http://127.0.0.1:30000", f"http://{host}:30000")
    # Of two ranks the second hands over the weights of the second server, perhaps on a machine of its own.
    assert violations_of_rank(0, 2, monkeypatch, *urls) == []
    (violation,) = violations_of_rank(1, 2, monkeypatch, *urls)
    assert (violation.key, violation.value) == ("rollout.sglang.transport", "ipc")
    assert urls[1] in violation.remedy and "rollout.sglang.transport=direct" in violation.remedy


def test_problem_of_a_machine_names_it_on_every_rank(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "56")
    monkeypatch.setenv("WORLD_SIZE", "64")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(SystemExit, match="1"):
        run_command(lambda: check_host(validated(composed(["experiment=arithmetic"]))))
    said = capsys.readouterr().err
    assert f"1 problem(s) in the configuration on {socket.gethostname()}:\n  resources.device = 'cpu'" in said


def test_error_keeps_its_machine_between_processes():
    error = pickle.loads(pickle.dumps(ConfigError([Violation("run.dir", "a", "It is full.")], host="node7")))
    assert error.host == "node7" and "in the configuration on node7:" in str(error)


AHEAD = ("rollout=sglang_cpu", "rollout.schedule=continuous")
CARRYING = ("rollout=sglang_cpu", "rollout.long_tail={oversample:1.5,until:useful,carry_updates:1}")


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (AHEAD, "rollout.schedule = continuous"),
        (CARRYING, "rollout.long_tail.carry_updates = 1"),
        ((*AHEAD, "objective.positive_term=logprob", "objective.ratio_reference=rollout"), "continuous"),
        (("rollout=sglang_cpu",), None),
        ((*AHEAD, "objective.importance_limit=2.0"), None),
        ((*AHEAD, "objective.importance_token_band=[0.5,2.0]"), None),
        ((*CARRYING, "objective.importance_response_band=[0.5,2.0]"), None),
        ((*AHEAD, "objective=cispo"), None),  # a loss function gets the rollout's log-probabilities
        ((*AHEAD, "objective.positive_term=ratio", "objective.ratio_reference=rollout"), None),
    ],
)
def test_older_tokens_without_a_correction_are_warned_of(caplog, overrides, named):
    warn_of_uncorrected_tokens(validated(composed(["experiment=arithmetic", *overrides])))
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == (named is not None)
    assert all(named in message and "objective.importance_limit" in message for message in messages)
