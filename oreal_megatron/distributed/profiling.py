"""Traces of torch's profiler, snapshots of device memory, and the timeline, for chosen steps."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import torch

from oreal_megatron.config import TrackingConfig
from oreal_megatron.distributed.groups import ParallelGroups
from oreal_megatron.timeline import Timeline

logger = logging.getLogger(__name__)

# Allocations that a snapshot of memory has, the last ones.
_MAX_ALLOCATIONS = 200_000


@contextlib.contextmanager
def profiled(directory: Path, config: TrackingConfig, *, step: int, rank: int) -> Iterator[None]:
    """Records a step of this rank if `tracking.profile` has it, into traces/ of the run's directory.

    A step that fails leaves its snapshot of memory, which shows what filled it.
    """
    if config.profile is None or not config.profile[0] <= step <= config.profile[1]:
        yield
        return
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    traces = directory / "traces"
    traces.mkdir(exist_ok=True)
    name = f"step_{step:06d}.rank_{rank:04d}"
    snapshot = (
        _memory_snapshot(traces / f"{name}.memory.pickle") if config.memory_snapshot else contextlib.nullcontext()
    )
    with snapshot, torch.profiler.profile(activities=activities) as profiler:
        yield
    path = traces / f"{name}.json.gz"
    profiler.export_chrome_trace(str(path))
    logger.info("trace of step %d: %s", step, path)


@contextlib.contextmanager
def _memory_snapshot(path: Path) -> Iterator[None]:
    """Records allocations of device memory with their stacks, and writes them, also after an error."""
    torch.cuda.memory._record_memory_history(max_entries=_MAX_ALLOCATIONS)
    try:
        yield
    finally:
        torch.cuda.memory._dump_snapshot(str(path))
        torch.cuda.memory._record_memory_history(enabled=None)


def gather_timeline(timeline: Timeline, groups: ParallelGroups, *, step: int) -> None:
    """Gathers what the replicas' first ranks recorded of a step; writes the trace after the last of the steps.

    Every rank calls it.

    Raises:
        OSError: the disk refused.
    """
    if not timeline.has(step):
        return
    recordings = groups.gather_to_main(timeline.take(is_last=timeline.ends_with(step)))
    timeline.keep(recordings)
    if timeline.ends_with(step):
        with groups.together():
            timeline.write()
