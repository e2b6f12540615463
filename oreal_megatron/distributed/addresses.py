"""Addresses and network interfaces by which other machines reach this one (no torch).

The machine's own name is no source for them: distributions map it to a loopback address in /etc/hosts.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
from collections.abc import Iterable

import psutil

GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"
"""Variable with the network interface of gloo's connections."""
_ANYWHERE = "192.0.2.1"
"""An address that is no machine's (RFC 5737), and that a default route leads to."""


def address_on_route(peer: str) -> str | None:
    """Returns this machine's address on the route to a host; None if that is this machine's loopback, or unknown.

    peer: name or address of the host.
    """
    with contextlib.suppress(OSError, UnicodeError):
        family, kind, _, _, where = socket.getaddrinfo(peer, 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(where)  # sends nothing: for UDP it only chooses the route
            address = str(probe.getsockname()[0])
        if not _is_loopback(address):
            return address
    return None


def address_towards(peers: Iterable[str]) -> str:
    """Returns the address of this machine on the route to the first peer that is another machine.

    peers: host names or addresses. Where all are this machine itself, or unknown, the result is the address of the
    default route, and 127.0.0.1 on a machine without a network.
    """
    for peer in (*peers, _ANYWHERE):
        if (address := address_on_route(peer)) is not None:
            return address
    return "127.0.0.1"


def choose_gloo_interface(peers: Iterable[str]) -> None:
    """Has gloo use the interface on the route to the first peer that is another machine, where it would use a loopback.

    Gloo connects at the address of the machine's name, and at 127.0.0.1 if the name is unknown. GLOO_SOCKET_IFNAME,
    which this sets, stays as it is if it has a value.
    """
    if GLOO_INTERFACE in os.environ or not _is_name_local():
        return
    for peer in peers:
        if (address := address_on_route(peer)) is not None:
            os.environ[GLOO_INTERFACE] = interface_of(address)
            return


def interface_of(address: str) -> str:
    """Returns the name of the network interface that has an address of this machine."""
    interfaces = psutil.net_if_addrs().items()
    return next(name for name, has in interfaces if address in {part.address.split("%")[0] for part in has})


def is_this_machine(host: str | None) -> bool:
    """Returns whether a name or address is this machine's: a socket can be bound to it."""
    with contextlib.suppress(OSError, UnicodeError):
        family, kind, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.bind(address)
            return True
    return False


def _is_name_local() -> bool:
    """Whether this machine's name is unknown to it, or its loopback address."""
    try:
        return _is_loopback(str(socket.getaddrinfo(socket.gethostname(), None)[0][4][0]))
    except OSError:
        return True


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.split("%")[0]).is_loopback
