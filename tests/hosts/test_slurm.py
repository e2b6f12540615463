"""A job of SLURM on three hosts whose own names are loopback addresses: trainer on two, servers on the third."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts.network import Network, missing, opened_network
from tests.servers.conftest import require_sglang
from tests.slurm.conftest import (
    SCRIPTS,
    Slurm,
    all_logs,
    has_steps,
    missing_daemons,
    oreal_submit,
    processes,
    submitted_job,
)
from tests.tiny import TINY

pytestmark = [pytest.mark.hosts, pytest.mark.slurm, pytest.mark.servers, pytest.mark.timeout(900)]


@pytest.fixture
def network(tmp_path: Path) -> Iterator[Network]:
    """Hosts of which the first submits."""
    require_sglang()
    if (reason := missing() or missing_daemons()) is not None:
        pytest.skip(reason)
    with opened_network(("login", "nodea", "nodeb", "nodec")) as opened:
        yield opened


@pytest.fixture
def slurm(network: Network, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """A cluster whose controller is on the first host, and whose nodes are the others."""
    base = tmp_path_factory.mktemp("slurm")
    lines = []
    for host in network.hosts.values():
        program = base / f"on_{host.name}"
        program.write_text(f'#!/bin/sh\nexec {shlex.join(host.command())} "$@"\n')
        program.chmod(0o755)
        lines.append(f"{host.name} {host.address} {program}\n")
    (base / "hosts").write_text("".join(lines))
    started = subprocess.run([SCRIPTS / "up.sh", base], capture_output=True, text=True, timeout=120)
    try:
        assert started.returncode == 0, started.stderr
        yield Slurm({**os.environ, "SLURM_CONF": str(base / "slurm.conf")})
    finally:
        subprocess.run([SCRIPTS / "down.sh", base], capture_output=True, timeout=120)


def test_trainer_and_server_on_hosts_with_debians_names(network, slurm, tmp_path):
    directory = tmp_path / "run"
    outcome = oreal_submit(
        *TINY,
        *("cluster=single_machine_test", "cluster.interface=null", "cluster.cpus_per_node=2"),
        *("resources.trainer_devices=2", "resources.devices_per_node=1", "run.async_checkpoints=false"),
        *("rollout=sglang_cpu", "rollout.sglang.startup_seconds=600", "run.num_steps=2", f"run.dir={directory}"),
        tmp_path=tmp_path,
        environment=slurm.environment,
        host=network["login"],
    )
    job = submitted_job(outcome)
    ended = slurm.ended(job, timeout=600)
    logs = all_logs(directory)
    assert ended["JobState"] == "COMPLETED", logs
    assert has_steps(directory, 2)
    assert "trainer on nodea,nodeb, servers on nodec" in logs
    # It is announced by a name that the trainer's hosts resolve, and listens at all of its addresses.
    assert "http://nodec:" in (directory / "slurm" / f"logs-{job}" / "servers_node_0.log").read_text()
    assert processes("", directory) == []
