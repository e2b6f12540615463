"""The report that a sub-command of `oreal-data` ends with."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

EXAMPLES = 3
"""Number of examples that a report shows of each kind."""


class Example(NamedTuple):
    """A record that a count of the report is about."""

    kind: str
    """Name of the count."""
    where: str
    """File and line or record."""
    text: str
    """Text that shows it, such as the gold answer."""


@dataclass
class Report:
    """Counts of records by what became of them, each with its first examples."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: list[Example] = field(default_factory=list)
    tables: dict[str, Counter[str]] = field(default_factory=dict)
    """Numbers of lines by a value of theirs, such as the band of the pass rate, in order; by the name of the value."""

    def add(self, kind: str, where: str, text: str) -> None:
        """Counts a record, and keeps it as an example if it is one of the first of its kind."""
        self.counts[kind] += 1
        if self.counts[kind] <= EXAMPLES:
            self.examples.append(Example(kind, where, text))

    def as_json(self) -> dict[str, Any]:
        """Returns the report as plain data."""
        return {
            "counts": dict(self.counts),
            "examples": [example._asdict() for example in self.examples],
            **({"tables": {name: dict(table) for name, table in self.tables.items()}} if self.tables else {}),
        }
