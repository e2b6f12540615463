"""Three hosts on this machine, opened for the session; without root or iproute2 these tests skip."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.hosts.network import Host, Network, missing, opened_network

NAMES = ("nodea", "nodeb", "nodec")


@pytest.fixture(scope="session")
def _network() -> Iterator[Network]:
    if (reason := missing()) is not None:
        pytest.skip(reason)
    with opened_network(NAMES) as opened:
        yield opened


@pytest.fixture
def network(_network: Network) -> Iterator[Network]:
    """The hosts, with whole links and Debian's /etc/hosts; a test's processes are killed at its end."""
    yield _network
    for host in _network.hosts.values():
        host.kill_processes()
        host.write_hosts(_network.debian_hosts(host))
        _network.restore(host)


@pytest.fixture
def nodea(network: Network) -> Host:
    return network["nodea"]


@pytest.fixture
def nodeb(network: Network) -> Host:
    return network["nodeb"]


@pytest.fixture
def nodec(network: Network) -> Host:
    return network["nodec"]
