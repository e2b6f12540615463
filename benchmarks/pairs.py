"""Two ways of doing one thing, timed in turn: these machines drift, so only ratios of neighbours mean something."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(ours: Callable[[], object], peer: Callable[[], object], *, pairs: int) -> tuple[float, float, float]:
    """(median seconds of ours, of the peer, median of the pairwise ratios ours / peer), after a warm-up of each."""
    ours()
    peer()
    times = [(seconds(ours), seconds(peer)) for _ in range(pairs)]
    mine, theirs = zip(*times, strict=True)
    return statistics.median(mine), statistics.median(theirs), statistics.median(a / b for a, b in times)
