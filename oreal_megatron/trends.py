"""Warnings of slow changes over the steps of a run, which no step shows by itself."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from scipy.stats import theilslopes

logger = logging.getLogger(__name__)

_EVERY = 10
"""Steps between two looks at the trends."""
_SMALL = 1e-3
"""Mismatch in nats below which a trend is rounding."""
_WINDOW = 30
"""Most steps, and half of it the fewest, whose mismatch a line is laid through."""


class Trends:
    """Values of every step so far, those of before a restart included."""

    def __init__(self) -> None:
        self._undecided_shares: list[float] = []
        self._mismatches: list[float] = []

    def add(self, metrics: Mapping[str, float]) -> None:
        """Takes the metrics of a step without a warning."""
        self._undecided_shares.append(
            metrics.get("reward/undecided", 0.0) / max(metrics.get("rollout/responses", 0.0), 1.0)
        )
        if (mismatch := metrics.get("policy/rollout_logprob_difference")) is not None:
            self._mismatches.append(mismatch)

    def warn(self) -> None:
        """Logs the trends that matter, every ten steps."""
        if self._undecided_shares and len(self._undecided_shares) % _EVERY == 0:
            self._warn_of_undecided()
            self._warn_of_mismatch()

    def _warn_of_undecided(self) -> None:
        """Warns where the share of UNDECIDED responses has doubled, and risen by a point at least."""
        shares, n = self._undecided_shares, _EVERY
        first, last = (sum(part) / n for part in (shares[:n], shares[-n:]))
        if len(shares) >= 2 * n and last > max(2 * first, first + 0.01):
            logger.warning(
                "UNDECIDED responses have risen from %.1f%% in the first %d steps to %.1f%% in the last %d: "
                "the policy may be learning answers that the verifier cannot read. The trajectories give the reasons",
                100 * first,
                n,
                100 * last,
                n,
            )

    def _warn_of_mismatch(self) -> None:
        """Warns where rollouts and policy drift apart: by the robust slope of Theil and Sen, with its 95% interval.

        The interval must be above zero, and the line must rise by half of its first value or more.
        """
        recent = self._mismatches[-_WINDOW:]
        if len(recent) < _WINDOW // 2:
            return
        slope, start, low, _ = theilslopes(recent)
        end = start + slope * (len(recent) - 1)
        if low > 0 and end > max(1.5 * start, _SMALL):
            logger.warning(
                "the log-probabilities of rollouts and policy drift apart: their mean difference rose by %.2g nats a "
                "step over the last %d steps, to %.3g (policy/rollout_logprob_difference). Before rollout.mismatch.stop"
                " ends the run: compare the precision of servers and trainer (rollout.sglang.dtype, fp8), or set "
                "objective.importance_limit",
                slope,
                len(recent),
                end,
            )
