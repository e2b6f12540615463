"""How ranks find each other: what they give to the job's store, and what a taken port says."""

from __future__ import annotations

import socket
from datetime import timedelta

import pytest
import torch.distributed as dist

from oreal_megatron.distributed import groups
from oreal_megatron.distributed.addresses import choose_gloo_interface


@pytest.fixture
def store(monkeypatch) -> dist.Store:
    monkeypatch.setenv("MASTER_ADDR", "nodea")
    monkeypatch.setattr(groups, "address_on_route", {"nodea": "10.0.0.2"}.get)
    return dist.HashStore()


def test_rank_that_has_an_interface_gives_its_address_to_the_others(store, monkeypatch):
    """The first rank of a host that calls itself 127.0.1.1 waits for it."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    choose_gloo_interface(groups._peers(store, 1, 2))
    assert store.get("address/1") == b"10.0.0.2"


def test_rank_waits_for_no_address_that_it_does_not_need(store):
    assert next(iter(groups._peers(store, 1, 3))) == "nodea"
    assert store.num_keys() == 1


def test_taken_port_is_named(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": "0", "WORLD_SIZE": "2"}
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ConnectionError, match=f"^MASTER_PORT = {port}: another process listens at it"):
            groups._rendezvous(timedelta(seconds=5))
