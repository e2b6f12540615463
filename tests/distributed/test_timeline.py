"""The timeline of two model replicas of two tensor ranks: the first rank of each is in the trace."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest

from oreal_megatron.config import ParallelConfig
from oreal_megatron.distributed.cpu_backend import cpu_backend
from oreal_megatron.distributed.groups import parallel_groups
from oreal_megatron.distributed.profiling import gather_timeline
from oreal_megatron.timeline import Timeline
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed


def _record(rank: int, directory: Path) -> None:
    with cpu_backend(), parallel_groups(ParallelConfig(tensor=2, pipeline=1, micro_batch_tokens=64), seed=0) as groups:
        timeline = Timeline(directory, (3, 4), rank=rank)
        timeline.state(0, "http://server", "connected", "weights 0")
        for step in (2, 3, 4, 5):
            timeline.begin(step)
            with timeline.recorded(f"step {step}"):
                timeline.request_begins(f"{rank}-{step}", f"step {step}", 0)
                groups.barrier()
                timeline.request_ends(f"{rank}-{step}", {"finish": "stop"})
            gather_timeline(timeline, groups, step=step)
        timeline.close()


def test_the_first_rank_of_each_replica_is_in_the_trace(tmp_path):
    run_ranks(4, _record, tmp_path, processes=multiprocessing.get_context("spawn"))
    (path,) = tmp_path.iterdir()
    assert path.name == "steps_000003_000004.json"
    slices = [event for event in json.loads(path.read_text())["traceEvents"] if event["ph"] == "X"]
    phases = {(event["pid"], event["name"]): event for event in slices if event["cat"] == "phase"}
    assert phases.keys() == {(rank, f"step {step}") for rank in (0, 2) for step in (3, 4)}
    for step in (3, 4):  # both ranks were in the same barrier
        first, second = (phases[rank, f"step {step}"] for rank in (0, 2))
        assert first["ts"] < second["ts"] + second["dur"] and second["ts"] < first["ts"] + first["dur"]
    assert len([event for event in slices if event["cat"] == "request"]) == 4
    assert len([event for event in slices if event["cat"] == "state"]) == 1  # the main rank's
