"""The fixture itself: hosts that have a name, reach each other, and lose each other when a link is cut."""

from __future__ import annotations

import socket
import sys

import pytest

from tests.ranks import FORK
from tests.run_processes import wait_until

pytestmark = pytest.mark.hosts

LISTEN = """
import socket, sys
listener = socket.create_server((sys.argv[1], 4000), family=socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET)
print(socket.gethostname(), socket.gethostbyname(socket.gethostname()), socket.gethostbyname("nodea"), flush=True)
while True:
    connection, _ = listener.accept()
    connection.sendall(connection.recv(100))
"""


def echo(address):
    with socket.create_connection((address, 4000), timeout=5) as connection:
        connection.sendall(b"a")
        return connection.recv(1)


@pytest.mark.parametrize("version", [4, 6])
def test_hosts_have_debian_names_and_reach_each_other(network, nodea, nodeb, tmp_path, version):
    log = tmp_path / "log"
    address = nodeb.address if version == 4 else nodeb.address6
    nodeb.start(sys.executable, "-c", LISTEN, address, log=log)
    wait_until(lambda: log.read_text() == f"nodeb 127.0.1.1 {nodea.address}\n")
    assert echo(address) == b"a"
    process = FORK.Process(target=_on_host, args=(nodea, address))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    nodeb.cut()
    with pytest.raises(OSError):
        socket.create_connection((address, 4000), timeout=0.5)
    network.restore(nodeb)
    assert echo(address) == b"a"


def _on_host(host, address):
    host.enter()
    assert socket.gethostname() == host.name and socket.gethostbyname(host.name) == "127.0.1.1"
    assert echo(address) == b"a"
