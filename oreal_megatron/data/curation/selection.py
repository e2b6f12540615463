"""Selection of records of a prompt file: by pass rate, by a condition, and a sample with as many of every value."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Any

from oreal_megatron.data.curation.report import Report
from oreal_megatron.data.difficulty import BANDS, band_of
from oreal_megatron.data.mapping import Source
from oreal_megatron.data.prompts import prompt_of, prompt_records
from oreal_megatron.files import json_line, write_parts_atomically
from oreal_megatron.seeds import derive_seed

NO_VALUE = "(none)"
"""Name of the value of records that have none."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Conditions on the records that are written."""

    pass_rate: tuple[float, float] | None = None
    """Lowest and highest pass rate, both included; records without one are left out. None: any, and none."""
    where: Source | None = None
    """Expression that has to be true of a record, or has to have a value other than an empty one."""
    limit: int | None = None
    """Largest number of records; which ones, depends on `seed`."""
    balance: Source | None = None
    """Expression of a value, such as the topic: of each as many records as of the others, as far as there are."""
    seed: int = 0


def select(path: Path, output: Path, selection: Selection, *, advance: Callable[[], None]) -> Report:
    """Writes the records that a selection takes, in their order, and reports what they are.

    The file is read twice. advance: is called twice for each record.

    Raises:
        ValueError: the file cannot be read, or no record meets the conditions.
    """
    report = Report()
    values = [_value(record, where, selection, report, advance) for where, record in prompt_records(path)]
    taken = _drawn(values, selection)
    if not any(taken):
        raise ValueError(
            f"{path}: none of {len(values)} records meets the conditions: "
            + ", ".join(f"{count} {kind}" for kind, count in report.counts.items())
        )
    report.counts["left out, beyond the limit"] += sum(value is not None for value in values) - sum(taken)
    write_parts_atomically(output, _lines(path, taken, selection, report, advance))
    return report


def _value(
    record: dict[str, Any], where: str, selection: Selection, report: Report, advance: Callable[[], None]
) -> str | None:
    """Returns the value of a record by which the sample is balanced; None: the record does not meet the conditions."""
    advance()
    pass_rate = prompt_of(record, where).pass_rate
    if selection.pass_rate is not None:
        low, high = selection.pass_rate
        if pass_rate is None:
            report.counts["left out, without a pass rate"] += 1
            return None
        if not low <= pass_rate <= high:
            report.counts[f"left out, pass rate not in {low:g} to {high:g}"] += 1
            return None
    if selection.where is not None and not selection.where.value(record):
        report.counts["left out by --where"] += 1
        return None
    return value_of(record, selection.balance)


def value_of(record: dict[str, Any], place: Source | None) -> str:
    """Returns the value at a place of a record as text."""
    value = None if place is None else place.value(record)
    return NO_VALUE if value is None else str(value)


def _drawn(values: list[str | None], selection: Selection) -> list[bool]:
    """Returns for each record whether it is in the sample. values: see `_value`."""
    by_value: dict[str, list[int]] = {}
    for index, value in enumerate(values):
        if value is not None:
            by_value.setdefault(value, []).append(index)
    sizes = {value: len(indices) for value, indices in by_value.items()}
    limit = sum(sizes.values()) if selection.limit is None else min(selection.limit, sum(sizes.values()))
    if selection.balance is not None and selection.limit is None:
        limit = len(sizes) * min(sizes.values(), default=0)
    shares = even_shares(sizes, limit)
    taken = [False] * len(values)
    for value, indices in by_value.items():
        for index in random.Random(derive_seed(selection.seed, "select", value)).sample(indices, shares[value]):
            taken[index] = True
    return taken


def even_shares(sizes: dict[str, int], total: int) -> dict[str, int]:
    """Returns how many of each value make `total`: as evenly as their numbers allow, the first values first.

    total: at most the sum of sizes.
    """
    shares = dict.fromkeys(sizes, 0)
    while total:
        open_ones = [value for value in sizes if shares[value] < sizes[value]]
        each = max(total // len(open_ones), 1)
        for value in open_ones[:total]:
            more = min(each, sizes[value] - shares[value])
            shares[value] += more
            total -= more
    return shares


def _lines(
    path: Path, taken: list[bool], selection: Selection, report: Report, advance: Callable[[], None]
) -> Iterator[bytes]:
    def read() -> Iterator[tuple[str, dict[str, Any]]]:
        for item in prompt_records(path):
            advance()
            yield item

    bands: Counter[str] = Counter(dict.fromkeys(BANDS, 0))
    values: Counter[str] = Counter()
    for where, record in compress(read(), taken):
        report.counts["written"] += 1
        bands[band_of(prompt_of(record, where).pass_rate)] += 1
        values[value_of(record, selection.balance)] += 1
        yield json_line(record)
    if any(bands[band] for band in BANDS):
        report.tables["pass rate"] = bands
    if selection.balance is not None:
        report.tables[selection.balance.path] = Counter(dict(values.most_common()))
