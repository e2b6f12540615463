"""A publisher plans once, whatever it does with the plan, and refuses servers that NCCL cannot connect to."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from oreal_megatron.compose import composed, validated
from oreal_megatron.config import ConfigError, SGLangConfig
from oreal_megatron.conversion.huggingface import geometry_of
from oreal_megatron.extensions import check_functions
from oreal_megatron.servers.client import RequestRefused
from oreal_megatron.weight_sync import commands, direct, planner, worker
from oreal_megatron.weight_sync.publisher import build_publisher
from oreal_megatron.weight_sync.source import PolicyShards
from oreal_megatron.weight_sync.types import PausedServer
from oreal_megatron.weight_sync.worker import load
from tests.tiny_models import policy_chunks, save_tiny
from tests.tiny_servers import servers_config
from tests.unit.weight_sync.test_types import Client, run

OWN = f"{__name__}."
EXAMPLE = Path(__file__).parents[3] / "examples" / "own_parts"


@pytest.mark.parametrize("transport", ["direct", "ipc"])
def test_publisher_plans_once_for_transport_and_audit(transport, single_process, tmp_path, monkeypatch):
    planned = []
    real = planner.served_tensors

    def counted(table, geometry, layout, rank):
        planned.append(rank)
        return real(table, geometry, layout, rank)

    monkeypatch.setattr(planner, "served_tensors", counted)
    source = save_tiny(tmp_path / "model", "qwen2", tied=False)
    shards = PolicyShards(policy_chunks(source, single_process), geometry_of(source), single_process)
    config = servers_config(tensor=2, transport=transport)
    publisher = build_publisher(config, shards, directory=tmp_path, config_json={})
    for num_servers in (1, 2):
        servers = [PausedServer(Client(RequestRefused("no"), f"http://{n}"), n, run) for n in range(num_servers)]
        result = publisher.deliver(servers)
        assert result.failures.keys() == {server.name for server in servers}
    assert planned == [0, 1]  # the tensor-parallel ranks of a server
    publisher.close()


class LoadingClient(Client):
    """A server of one rank, whose worker executes the command in this process."""

    def __init__(self, url: str, module: torch.nn.Module):
        super().__init__(url=url)
        self.module = module

    async def update_weights_from_tensor(self, payloads: Sequence[bytes], load_format: str) -> None:
        load(self.module, pickle.loads(payloads[0]))


def test_server_with_another_nccl_is_refused_before_it_joins(single_process, tmp_path, monkeypatch):
    source = save_tiny(tmp_path / "model", "qwen2", tied=False)
    shards = PolicyShards(policy_chunks(source, single_process), geometry_of(source), single_process)
    publisher = build_publisher(servers_config(transport="direct"), shards, directory=tmp_path, config_json={})
    monkeypatch.setattr(publisher, "_uses_nccl", True)
    monkeypatch.setattr(commands, "nccl_version", lambda: "2.29.7")
    monkeypatch.setattr(worker, "nccl_version", lambda: "2.30.7")
    monkeypatch.setattr(worker, "_check_parameters", lambda *_: None)
    joined: list[str] = []
    monkeypatch.setattr(direct, "join", lambda *_: joined.append("joined"))
    result = publisher.deliver([PausedServer(LoadingClient("http://0", torch.nn.Linear(1, 1)), 0, run)])
    assert "its NCCL is 2.30.7, the trainer's is 2.29.7" in result.failures["http://0"].reason
    assert not joined
    publisher.close()


@pytest.fixture
def shards(single_process, tmp_path):
    source = save_tiny(tmp_path / "model", "qwen2", tied=False)
    return PolicyShards(policy_chunks(source, single_process), geometry_of(source), single_process)


def test_example_copies_the_weights_and_has_the_server_load_them(shards, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLE)
    settings = {"command": ["cp", "-rT", "{source}", "{target}"], "target": str(tmp_path / "copy")}
    config = servers_config(transport={"path": "copied.Copied", "settings": settings})
    publisher = build_publisher(config, shards, directory=tmp_path / "weights", config_json={"a": 1})
    publisher.prepare(3)
    refuses, client = Client(RequestRefused("no"), "http://0"), Client(url="http://1")
    transport = publisher._transport
    sent = transport.send([PausedServer(refuses, 0, run), PausedServer(client, 1, run)])
    assert {name: failure.reason for name, failure in sent.failures.items()} == {"http://0": "no"}
    assert client.directories == [tmp_path / "copy"] and sent.num_bytes == shards.num_bytes
    written, copied = (sorted(path.rglob("*")) for path in (tmp_path / "weights" / "version_000003", tmp_path / "copy"))
    assert [path.read_bytes() for path in written] == [path.read_bytes() for path in copied] and len(copied) == 3
    transport.settings = transport.settings.model_copy(update={"command": ("ls", "/no/{target}")})
    (failure,) = transport.send([PausedServer(client, 0, run)]).failures.values()
    assert failure.reason.startswith("ls: ") and not failure.is_lost
    publisher.close()


class Forgets:
    """A transport that returns nothing."""

    def __init__(self, **_): ...

    def prepare(self, weight_version): ...

    def send(self, servers): ...

    def close(self): ...


class HasNoSend:
    def __init__(self, **_): ...

    def prepare(self, weight_version): ...


class TakesNoVersion(Forgets):
    def prepare(self): ...


class TakesNoShards(Forgets):
    def __init__(self, directory): ...


def factory(**_):
    return Forgets()


def test_own_transport_without_a_result_is_named(shards, tmp_path):
    publisher = build_publisher(
        servers_config(transport={"path": f"{OWN}Forgets"}), shards, directory=tmp_path, config_json={}
    )
    publisher.prepare(0)
    with pytest.raises(ValueError, match=r"transport = .*Forgets: send returned None; return a TransferResult"):
        publisher.deliver([])
    publisher.close()


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("HasNoSend", "Its method `send` cannot be called"),
        ("TakesNoVersion", "Its method `prepare` cannot be called: too many positional arguments"),
        ("TakesNoShards", "It is called with the keywords shards, directory, config_json"),
        ("factory", "It is a function. Set it to module.name of a class."),
        ("Missing", "It cannot be imported"),
    ],
)
def test_own_transport_is_checked_before_the_run(name, problem):
    config = validated(composed(["experiment=arithmetic_sglang", f"rollout.sglang.transport={OWN}{name}"]))
    (violation,) = check_functions(config)
    assert (violation.key, violation.value) == ("rollout.sglang.transport", f"{OWN}{name}")
    assert problem in violation.remedy


@pytest.mark.parametrize(
    ("transport", "key", "problem"),
    [
        ("dirct", "rollout.sglang.transport", "'direct', 'broadcast', 'ipc' or 'disk'"),
        ("5", "rollout.sglang.transport", "valid dictionary or instance of FunctionConfig"),
        ("{path: a.b, seting: {}}", "rollout.sglang.transport.seting", "settings"),
    ],
)
def test_mistyped_transport_is_refused_with_its_key(transport, key, problem):
    with pytest.raises(ConfigError) as refused:
        validated(composed(["experiment=arithmetic_sglang", f"rollout.sglang.transport={transport}"]))
    (violation,) = refused.value.violations
    assert violation.key == key and problem in violation.remedy


def test_settings_of_servers_are_read_back_with_a_transport_of_ones_own():
    config = servers_config(transport={"path": "copied.Copied", "settings": {"target": "/copy"}})
    assert SGLangConfig(**config.model_dump()) == config
