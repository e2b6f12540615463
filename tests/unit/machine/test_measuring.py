"""What several processes measure together, on devices of two nodes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.fake_sglang import free_port


@pytest.mark.end_to_end
def test_links_within_a_node_and_between_nodes_are_measured_apart():
    nodes = "aab"
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "3", "OMP_NUM_THREADS": "1"}
    options = ["--device=cpu", "--shrink=32", "--seconds=0.01"]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "oreal_megatron.machine.measuring", *options],
            env={**os.environ, **shared, "RANK": str(rank), "SLURMD_NODENAME": node},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank, node in enumerate(nodes)
    ]
    answers = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * len(nodes)
    assert [line for answer in answers[1:] for line in answer.splitlines() if line.startswith("{")] == []
    found = json.loads(next(line for line in answers[0].splitlines() if line.startswith("{")))
    assert found.pop("device_name") == "CPU" and min(found.values()) > 0
    kinds = ("matrix_flops", "memory_bytes_per_second", "node_bytes_per_second", "link_bytes_per_second")
    assert tuple(found) == kinds
