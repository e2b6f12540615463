"""Bands of pass rates, in which prompts are counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from oreal_megatron.types import Prompt

_EDGES = (0.2, 0.4, 0.6, 0.8)
BANDS = ("0", "0_to_0.2", "0.2_to_0.4", "0.4_to_0.6", "0.6_to_0.8", "0.8_to_1", "1")
"""Names of the bands, from hard to easy. A band has its lower bound and not its upper one; 0 and 1 are their own."""
UNKNOWN = "unknown"
"""Name for prompts without a pass rate."""


def band_of(pass_rate: float | None) -> str:
    """Returns the name of a pass rate's band."""
    if pass_rate is None:
        return UNKNOWN
    if pass_rate in (0.0, 1.0):
        return BANDS[int(pass_rate) * (len(BANDS) - 1)]
    return BANDS[1 + sum(pass_rate >= edge for edge in _EDGES)]


def drawn_shares(prompts: Iterable[Prompt]) -> dict[str, float]:
    """Returns the shares of prompts by band of pass rate, `pass_rate_BAND`, and by named source, `from_SOURCE`.

    Without a pass rate, or without a named source, among the prompts there are none of the kind.
    """
    prompts = list(prompts)
    bands = Counter(band_of(prompt.pass_rate) for prompt in prompts)
    sources = Counter(prompt.source for prompt in prompts if prompt.source is not None)
    count = max(len(prompts), 1)
    by_band = {f"pass_rate_{band}": bands[band] / count for band in (*BANDS, UNKNOWN)}
    return {
        **(by_band if bands.keys() - {UNKNOWN} else {}),
        **{f"from_{source}": number / count for source, number in sorted(sources.items())},
    }
