"""Ranks of a trainer on two hosts with Debian's /etc/hosts, which find each other or end together."""

from __future__ import annotations

import multiprocessing
import os
import sys

import pytest

from oreal_megatron.cli.errors import run_command
from oreal_megatron.config import ParallelConfig
from oreal_megatron.distributed.cpu_backend import cpu_backend
from oreal_megatron.distributed.groups import parallel_groups

pytestmark = pytest.mark.hosts

CONFIG = ParallelConfig(tensor=1, pipeline=1, micro_batch_tokens=512, timeout_seconds=30)
# Forked from a process of their own: this one may have process groups of other tests, whose threads a fork lacks.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["oreal_megatron.distributed.groups"])


def join(host, rank, port, variables, config, said):
    """Joins the groups as a rank on a host, and ends as a command does."""
    host.enter()
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="nodea", MASTER_PORT=str(port), **variables)
    sys.stdout = sys.stderr = said.open("a", buffering=1)

    def command():
        with cpu_backend(), parallel_groups(config, seed=0) as groups:
            print(groups.gather_over_world([host.name]))

    run_command(command)


def ended(hosts, port, directory, *, interface=None, ranks=(0, 1), config=CONFIG):
    """Exit status and output of every rank."""
    variables = {} if interface is None else {"GLOO_SOCKET_IFNAME": interface}
    return status_and_output(
        join, [(hosts[rank], rank, port, variables, config, directory / str(rank)) for rank in ranks]
    )


def status_and_output(function, arguments, seconds=90):
    """Exit status and output of a process for each of `arguments`, which end with the file of the output."""
    processes = [PROCESSES.Process(target=function, args=some) for some in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(seconds)
        process.kill()
    return [process.exitcode for process in processes], [log.read_text() for *_, log in arguments]


def test_ranks_meet_over_the_interface_that_leads_to_each_other(nodea, nodeb, tmp_path):
    codes, said = ended((nodea, nodeb), 4001, tmp_path)
    assert (codes, said) == ([0, 0], ["[['nodea'], ['nodeb']]\n"] * 2)


def test_ranks_that_cannot_connect_end_together_and_name_the_variable(nodea, nodeb, tmp_path):
    """Gloo itself waits for five times its timeout on one of them."""
    codes, said = ended((nodea, nodeb), 4002, tmp_path, interface="lo")
    assert codes == [1, 1], said
    assert "gloo's network interface is lo: set GLOO_SOCKET_IFNAME, or cluster.interface" in "".join(said)
    assert "Traceback" not in "".join(said)


def test_rank_without_the_others_says_where_it_waited(nodea, nodeb, tmp_path):
    config = CONFIG.model_copy(update={"timeout_seconds": 3})
    codes, said = ended((nodea, nodeb), 4003, tmp_path, ranks=(1,), config=config)
    assert codes == [1] and said[0].startswith("error: rank 1: the 2 processes of the job did not meet at nodea:4003")
