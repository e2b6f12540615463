"""The address by which a trainer's workers report, on hosts with several kinds of /etc/hosts."""

from __future__ import annotations

import sys

import pytest

from tests.hosts.network import LINK

pytestmark = pytest.mark.hosts

PRINT = """
import ast, sys
from oreal_megatron.distributed.addresses import address_towards
print(*map(address_towards, ast.literal_eval(sys.argv[1])))
"""


def addresses(host, *peers):
    """Returns the address that the host gives for each list of peers; one process, since it imports torch."""
    return host.output(sys.executable, "-c", PRINT, repr([list(part) for part in peers])).split()


@pytest.mark.parametrize(
    "hosts",
    [
        "127.0.0.1 localhost\n127.0.1.1 nodea\n",
        "127.0.0.1 localhost nodea\n",
        "127.0.0.1 localhost\n",
        "127.0.0.1 localhost\n{own} nodea.example.org\n",
        "127.0.0.1 localhost\n::1 localhost nodea\n{own} nodea\n",
    ],
    ids=["debian", "localhost", "no name", "name with its domain only", "two addresses"],
)
def test_address_is_the_one_that_the_other_host_reaches(nodea, nodeb, hosts):
    nodea.write_hosts(hosts.format(own=nodea.address) + f"{nodeb.address} nodeb\n")
    found = addresses(
        nodea, ["nodeb"], [nodeb.address], ["nodea", nodeb.address], [nodeb.address6], [], ["127.0.0.1"], ["nowhere"]
    )
    assert found == [nodea.address] * 3 + [nodea.address6] + ["127.0.0.1"] * 3


def test_address_is_of_the_interface_that_leads_to_the_peer(nodea, nodeb):
    """With two addresses on the link and a default route, every peer has the address of its own route."""
    nodea.output("ip", "address", "add", "10.88.0.1/24", "dev", LINK)
    nodea.output("ip", "route", "add", "default", "via", "10.88.0.2")
    try:
        assert addresses(nodea, ["10.88.0.9"], [nodeb.address], []) == ["10.88.0.1", nodea.address, "10.88.0.1"]
    finally:
        nodea.output("ip", "address", "delete", "10.88.0.1/24", "dev", LINK)
