"""Units under way at servers: requests that are added, and what the event loop reports of them to another thread."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from oreal_megatron.types import Completion, GenerationRequest


@dataclass(frozen=True)
class Outcome:
    """Message of work on the event loop to the thread that waits for it."""

    value: Any = None
    error: Exception | None = None
    no_current_weights: bool = False
    """Whether no server has the current weights."""


@dataclass(frozen=True)
class Generation:
    """A generation that runs while its owner does something else."""

    future: concurrent.futures.Future[None]
    """Done once the generation has ended; its cancellation ends the generation."""
    add: Callable[[Sequence[Sequence[GenerationRequest]]], None]
    """Adds units, whose positions follow those that there are."""


class Units:
    """Units of requests, each reported once all its completions are there."""

    def __init__(self, units: Sequence[Sequence[GenerationRequest]], report: Callable[[Outcome], None]):
        self.report = report
        self._places: list[tuple[int, int]] = []
        """Position of its unit, and place in the unit, of every request."""
        self._parts: list[list[Completion | None]] = []
        self.requests = self.add(units)

    def add(self, units: Sequence[Sequence[GenerationRequest]]) -> list[GenerationRequest]:
        """Adds units, and returns their requests in order."""
        for position, unit in enumerate(units, len(self._parts)):
            self._places += [(position, place) for place in range(len(unit))]
            self._parts.append([None] * len(unit))
        return [request for unit in units for request in unit]

    def completed(self, index: int, completion: Completion) -> None:
        """Takes the completion of a request."""
        position, place = self._places[index]
        part = self._parts[position]
        part[place] = completion
        if None not in part:
            # The unit is not kept here: its tokens as Python numbers take eight times their bytes.
            self._parts[position] = []
            self.report(Outcome(value=(position, part)))
