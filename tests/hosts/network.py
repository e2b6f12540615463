"""Several hosts on one machine: network namespaces on a bridge, each with a name, /etc/hosts and addresses of its own.

A host's processes share the file system and the process ids of the machine. As on Debian and Ubuntu, a host's own name
is 127.0.1.1 in its /etc/hosts; the other hosts' names are their addresses.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

LINK = "eth0"
"""Name of a host's network interface."""
_CLONE_NEWNS, _CLONE_NEWUTS, _CLONE_NEWNET = 0x00020000, 0x04000000, 0x40000000


@dataclass(frozen=True)
class Host:
    """A host of a `Network`."""

    name: str
    namespace: str
    address: str
    address6: str
    cable: str
    """The machine's end of the host's link."""

    def command(self, *command: str) -> list[str]:
        """Returns the command line that runs a command on this host."""
        # `ip netns exec` would mount another /sys, in which SLURM finds no control groups.
        enter = ["nsenter", f"--net=/run/netns/{self.namespace}", "unshare", "--mount", "--uts"]
        script = f'hostname "$0" && mount --bind /etc/netns/{self.namespace}/hosts /etc/hosts && exec "$@"'
        return [*enter, "sh", "-c", script, self.name, *command]

    def start(self, *command: str, log: Path) -> subprocess.Popen[bytes]:
        """Starts a command on this host in a session of its own; its output is appended to `log`."""
        with log.open("ab") as stream:
            return subprocess.Popen(
                self.command(*command),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )

    def output(self, *command: str) -> str:
        """Returns the output of a command that succeeds on this host."""
        return subprocess.run(self.command(*command), check=True, capture_output=True, text=True, timeout=60).stdout

    def enter(self) -> None:
        """Moves this process to the host. Call it in a child process: there is no way back."""
        libc = ctypes.CDLL(None, use_errno=True)
        with open(f"/run/netns/{self.namespace}") as namespace:
            for failed in (
                libc.setns(namespace.fileno(), _CLONE_NEWNET),
                libc.unshare(_CLONE_NEWNS | _CLONE_NEWUTS),
            ):
                if failed:
                    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        socket.sethostname(self.name)
        _run("mount", "--make-rprivate", "/")
        _run("mount", "--bind", f"/etc/netns/{self.namespace}/hosts", "/etc/hosts")

    def write_hosts(self, text: str) -> None:
        """Replaces the contents of the host's /etc/hosts, for processes that run already too."""
        Path(f"/etc/netns/{self.namespace}/hosts").write_text(text)

    def cut(self) -> None:
        """Cuts the link: packets from and to the host are lost, and neither side is notified."""
        _run("ip", "link", "set", self.cable, "nomaster")

    def join(self, bridge: str) -> None:
        """Connects the link to a bridge."""
        _run("ip", "link", "set", self.cable, "master", bridge, "up")

    def forget_connections(self) -> None:
        """Destroys the host's established TCP connections, as a host that starts again does. Cut the link before it, or
        the other side is notified."""
        self.output("ss", "--kill", "--tcp", "state", "established")

    def kill_processes(self) -> None:
        """Kills every process on the host."""
        for pid in self.output("ip", "netns", "pids", self.namespace).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


@dataclass(frozen=True)
class Network:
    """Hosts on one bridge. The process that opened it reaches them all, and they reach it at `address`."""

    bridge: str
    address: str
    address6: str
    hosts: Mapping[str, Host]

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]

    def restore(self, host: Host) -> None:
        """Restores a link that was cut."""
        host.join(self.bridge)

    def debian_hosts(self, host: Host) -> str:
        """Returns /etc/hosts of a host as Debian writes it, with the names of the other hosts."""
        others = [f"{other.address} {other.name}" for other in self.hosts.values() if other is not host]
        return "\n".join(["127.0.0.1 localhost", f"127.0.1.1 {host.name}.example.org {host.name}", *others, ""])


def missing() -> str | None:
    """Returns why this machine cannot have network namespaces; None if it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if any(shutil.which(tool) is None for tool in ("ip", "ss")):
        return "iproute2 is not installed: make hosts-deps"
    probe = f"oreal{os.getpid()}probe"
    if subprocess.run(["ip", "netns", "add", probe], capture_output=True).returncode:
        return "this container lets root make no network namespaces"
    _run("ip", "netns", "delete", probe)
    return None


@contextlib.contextmanager
def opened_network(names: Sequence[str]) -> Iterator[Network]:
    """Opens a network of named hosts; at the end kills their processes and removes it."""
    subnet = _free_subnet()
    bridge = f"oreal{subnet}"  # a process may have several networks
    with contextlib.ExitStack() as stack:
        network = Network(bridge, f"10.77.{subnet}.1", f"fd77:{subnet:x}::1", {})
        _run("ip", "link", "add", bridge, "type", "bridge")
        stack.callback(_run, "ip", "link", "delete", bridge)
        _run("ip", "address", "add", f"{network.address}/24", "dev", bridge)
        _run("ip", "address", "add", f"{network.address6}/64", "dev", bridge, "nodad")
        _run("ip", "link", "set", bridge, "up")
        hosts = {
            name: Host(
                name=name,
                namespace=f"{bridge}-{name}",
                address=f"10.77.{subnet}.{11 + number}",
                address6=f"fd77:{subnet:x}::{11 + number}",
                cable=f"{bridge}h{number}",
            )
            for number, name in enumerate(names)
        }
        network = Network(bridge, network.address, network.address6, hosts)
        for host in hosts.values():
            stack.enter_context(_opened_host(host, network))
        yield network


@contextlib.contextmanager
def _opened_host(host: Host, network: Network) -> Iterator[None]:
    files = Path("/etc/netns", host.namespace)
    files.mkdir(parents=True)
    _run("ip", "netns", "add", host.namespace)
    inside = ("ip", "-netns", host.namespace)
    try:
        host.write_hosts(network.debian_hosts(host))
        _run("ip", "link", "add", host.cable, "type", "veth", "peer", "name", LINK, "netns", host.namespace)
        _run(*inside, "address", "add", f"{host.address}/24", "dev", LINK)
        _run(*inside, "address", "add", f"{host.address6}/64", "dev", LINK, "nodad")
        for interface in (LINK, "lo"):
            _run(*inside, "link", "set", interface, "up")
        host.join(network.bridge)
        yield
    finally:
        host.kill_processes()
        _run("ip", "netns", "delete", host.namespace)
        shutil.rmtree(files)


def _free_subnet() -> int:
    """Returns the third byte of a subnet of 10.77.0.0/16 that this machine does not use."""
    used = subprocess.run(["ip", "-4", "address"], check=True, capture_output=True, text=True).stdout
    candidates = (1 + (os.getpid() + number) % 254 for number in range(254))
    return next(number for number in candidates if f" 10.77.{number}." not in used)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
