"""A run whose hosts have different directories at run.dir."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.hosts.test_joining import status_and_output
from tests.tiny import TINY, command_in_fork

pytestmark = pytest.mark.hosts


def train(host, rank, directory, log):
    host.enter()
    if rank == 1:
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", directory], check=True)  # seen by this process alone
    sys.stdout = sys.stderr = log.open("a", buffering=1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="nodea", MASTER_PORT="4010")
    command_in_fork((*TINY, f"run.dir={directory}", "parallel.timeout_seconds=10"), str(log), str(log))


def test_directory_that_hosts_do_not_share_is_refused_by_every_rank(nodea, nodeb, tmp_path):
    directory = tmp_path / "run"
    directory.mkdir()
    codes, said = status_and_output(
        train, [(nodea, 0, directory, tmp_path / "0"), (nodeb, 1, directory, tmp_path / "1")]
    )
    assert codes == [1, 1], said
    for text in said:
        assert f": run.dir = '{directory}': rank 1 on nodeb does not see the files that rank 0 on nodea" in text
    assert not (directory / "checkpoints").exists() and not (directory / "config.yaml").exists()
