"""Who runs where in a job, and what its script's header asks for."""

from __future__ import annotations

import socket
import threading
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from oreal_megatron.compose import composed
from oreal_megatron.config import ConfigError
from oreal_megatron.slurm.cluster import parse_cluster, seconds_of
from oreal_megatron.slurm.node_servers import NodeServers, servers_of_node
from oreal_megatron.slurm.sbatch import Allocation, allocation, rendered
from tests.unit.planner.test_recipes import recipe


def test_every_server_has_one_node():
    for num_servers, num_nodes in ((8, 8), (8, 4), (5, 2), (2, 1), (1, 1)):
        placed = [index for node in range(num_nodes) for index in servers_of_node(num_servers, node, num_nodes)]
        assert placed == list(range(num_servers))
    assert list(servers_of_node(5, 1, 2)) == [3, 4]


def test_a_taken_port_of_a_node_is_no_traceback(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = recipe("oreal_32b_disaggregated", f"rollout.sglang.port={port}", f"run.dir={tmp_path}")
        options = {"host": "127.0.0.1", "logs": tmp_path, "kv_tokens": None, "ending": threading.Event()}
        with pytest.raises(ValueError, match=f"rollout.sglang.port = {port}: server 0 cannot listen"):
            NodeServers(config, config.rollout.sglang, [0], **options)


def test_roles_spread_over_nodes():
    apart = recipe("oreal_32b_disaggregated")
    assert allocation(apart, 64).num_nodes == 16
    shared = allocation(recipe("oreal_32b"), 128)
    assert (shared.num_nodes, shared.server_nodes, shared.servers_share) == (16, 16, True)
    assert allocation(apart, 64, 16, judge_nodes=2).num_nodes == 16 + 8 + 2
    running = recipe("oreal_32b_disaggregated", "rollout.sglang.urls=[http://elsewhere:30000]")
    assert allocation(running, 64) == Allocation(trainer_nodes=8, processes_per_node=8)


def test_roles_that_do_not_spread_are_named_together():
    with pytest.raises(ConfigError) as caught:
        allocation(recipe("oreal_32b_disaggregated"), 64, 12, server_nodes=4)
    assert [v.key for v in caught.value.violations] == ["resources.trainer_devices", "rollout.sglang.num_servers"]


def header(*overrides: str, name: str = "run", directory: str = "/r") -> list[str]:
    names = ("account=a", "partition=train", "models=/m", "data=/d", "runs=/r", "venv=null")
    raw = composed(["cluster=slurm", *(f"cluster.{name}" for name in names), *overrides])
    site: Any = OmegaConf.to_container(raw["cluster"], resolve=True)
    config = recipe("oreal_32b_disaggregated", f"run.name='{name}'")
    paths = {"logs": Path(directory), "configuration": Path(directory, "conf")}
    script = rendered(config, parse_cluster(site), allocation(config, 64), ["a=b c"], **paths)
    assert "arguments=('a=b c')" in script
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]


def test_servers_of_another_kind_are_a_second_component():
    assert "hetjob" not in header() and "--nodes=16" in header()
    lines = header("cluster.server_partition=serve", "cluster.constraint=h100")
    first, second = lines[: lines.index("hetjob")], lines[lines.index("hetjob") :]
    assert {"--partition=train", "--constraint=h100", "--nodes=8", "--gpus-per-node=8"} <= set(first)
    assert {"--partition=serve", "--account=a", "--nodes=8", "--gpus-per-node=8"} <= set(second)
    assert "--constraint=h100" not in second


def test_names_with_spaces_are_one_word_of_the_header():
    lines = header(name="my run #2", directory="/my runs")
    assert '--job-name="my run #2"' in lines and '--output="/my runs/job-%j.log"' in lines


def test_time_limits_are_read():
    assert [seconds_of(text) for text in ("00:02:00", "08:00:00", "2-01:00:05")] == [120, 28800, 176405]
