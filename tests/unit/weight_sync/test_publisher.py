"""A publisher plans once, whatever it does with the plan, and refuses servers that NCCL cannot connect to."""

from __future__ import annotations

import pickle
from collections.abc import Sequence

import pytest
import torch

from oreal_megatron.conversion.huggingface import geometry_of
from oreal_megatron.servers.client import RequestRefused
from oreal_megatron.weight_sync import commands, direct, planner, worker
from oreal_megatron.weight_sync.publisher import build_publisher
from oreal_megatron.weight_sync.source import PolicyShards
from oreal_megatron.weight_sync.types import PausedServer
from oreal_megatron.weight_sync.worker import load
from tests.tiny_models import policy_chunks, save_tiny
from tests.tiny_servers import servers_config
from tests.unit.weight_sync.test_types import Client, run


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
