"""A publisher plans once, whatever it does with the plan."""

from __future__ import annotations

import pytest

from oreal_megatron.conversion.huggingface import geometry_of
from oreal_megatron.servers.client import RequestRefused
from oreal_megatron.weight_sync import planner
from oreal_megatron.weight_sync.publisher import build_publisher
from oreal_megatron.weight_sync.source import PolicyShards
from oreal_megatron.weight_sync.types import PausedServer
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
