"""Wall seconds and peak memory of the phases of a step."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import torch

from oreal_megatron.distributed.cpu_backend import peak_memory, reset_peak_memory
from oreal_megatron.distributed.groups import ParallelGroups


class StepTimer:
    """Measures phases: `with timer("score"):` is a phase, and the same name again adds to it.

    The total runs from the construction of the timer. Phases do not nest.
    """

    def __init__(self, record: Callable[[str, float, float], None] = lambda phase, start, end: None) -> None:
        """Begins the total. record: called with every phase, its start and its end, in seconds of time.perf_counter."""
        self._start = time.perf_counter()
        self._record = record
        self._seconds: dict[str, float] = {}
        self._peaks: dict[str, int] = {}

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        reset_peak_memory()
        with torch.profiler.record_function(phase):
            yield
        end = time.perf_counter()
        self._seconds[phase] = self._seconds.get(phase, 0.0) + end - start
        self._record(phase, start, end)
        if (peak := peak_memory()) is not None:
            self._peaks[phase] = max(peak, self._peaks.get(phase, 0))

    def seconds(self) -> dict[str, float]:
        """Returns the wall seconds of every phase, and of the step as `total`."""
        return {**self._seconds, "total": time.perf_counter() - self._start}

    def peak_gib(self, groups: ParallelGroups) -> dict[str, float]:
        """Returns the peak memory of every phase in GiB, of the process that needed most. All processes call it."""
        gathered = [dict(part) for part in groups.gather_over_world(list(self._peaks.items()))]
        return {phase: max(peaks.get(phase, 0) for peaks in gathered) / 2**30 for phase in self._peaks}
