"""Confidence intervals of scores over the problems of a benchmark, and of the difference between two models."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats

LEVEL = 0.95
"""Confidence level of every interval."""
_RESAMPLES = 9_999

Interval = tuple[float, float]


def interval_of_mean(values: Sequence[float]) -> Interval | None:
    """Returns the interval of the mean of a score over problems; None where the values do not say how wide it is.

    values: a score in [0, 1] for each problem. Where each is 0 or 1 it is Wilson's interval of a share, else the
    percentiles of means over problems drawn again with replacement (bootstrap).
    """
    if values and all(value in (0.0, 1.0) for value in values):
        share = stats.binomtest(int(sum(values)), len(values)).proportion_ci(LEVEL, method="wilson")
        return float(share.low), float(share.high)
    return _bootstrap(values)


def paired_interval(first: Sequence[float], second: Sequence[float]) -> Interval | None:
    """Returns the interval of mean(second) - mean(first) over the same problems, by the bootstrap over problems.

    None where the difference is the same for every problem, so that it does not say how wide the interval is.
    """
    return _bootstrap([b - a for a, b in zip(first, second, strict=True)])


def sign_test(num_gained: int, num_lost: int) -> float:
    """Returns the p-value of so uneven a number of gained and lost problems between equal models (exact McNemar test).

    1 where no problem differs.
    """
    flips = num_gained + num_lost
    return float(stats.binomtest(num_gained, flips).pvalue) if flips else 1.0


def _bootstrap(values: Sequence[float]) -> Interval | None:
    if len(set(values)) < 2:
        return None
    found = stats.bootstrap(
        (np.asarray(values, dtype=np.float64),),
        np.mean,
        n_resamples=_RESAMPLES,
        batch=1_000,
        vectorized=True,
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(found.low), float(found.high)
