"""The timeline of chosen steps over trainer ranks and servers, as one Chrome trace.

Times are those of `time.perf_counter` in seconds until the trace is built, whose unit is the microsecond.
"""

from __future__ import annotations

import contextlib
import heapq
import json
import logging
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from oreal_megatron.files import write_atomically

logger = logging.getLogger(__name__)

# Threads of a process in the trace. The requests of a server follow, as many rows as overlap.
_PHASES, _STATES, _REQUESTS = 0, 0, 1
_MICROSECONDS = 1e6


@dataclass(frozen=True, kw_only=True)
class Event:
    """A phase, a state or a request, between two times of the recording process."""

    kind: Literal["phase", "state", "request"]
    """Kind of the event: a phase of a trainer rank, a state of a server, or a request at a server."""
    name: str
    start: float
    end: float
    server: int | None = None
    """Index of the server; None for a phase."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Values that the viewer shows of the event."""


@dataclass(frozen=True, kw_only=True)
class Recording:
    """Events of one process and its clock."""

    rank: int
    host: str
    wall_offset: float
    """`time.time()` minus `time.perf_counter()`, measured once a process."""
    events: Sequence[Event]
    urls: Mapping[int, str]
    """URLs of the servers that this process knows, by index."""


class Timeline:
    """Recorder of this process. Phases come from the trainer's thread, requests and states from that of the servers.

    While nothing is recorded, a phase costs a comparison, and a request or a state an entry of a dictionary: those
    under way have to be known when a recording begins.
    """

    def __init__(self, directory: Path | None = None, steps: tuple[int, int] | None = None, *, rank: int = 0):
        """Records nothing yet. directory: of the trace. steps: first and last step; None: nothing is ever recorded."""
        self._directory = directory
        self._steps = steps
        self._rank = rank
        self._wall_offset = time.time() - time.perf_counter()
        self._lock = threading.Lock()
        self._is_recording = False
        self._origin = 0.0
        self._recorded: list[int] = []
        self._events: list[Event] = []
        self._requests: dict[str, Event] = {}
        self._states: dict[int, Event] = {}
        self._urls: dict[int, str] = {}
        self._gathered: list[Recording] = []

    def begin(self, step: int) -> None:
        """Begins to record, or goes on, if `step` is one of the steps."""
        if self._steps is not None and self._steps[0] <= step <= self._steps[1]:
            if not self._recorded:
                self._origin = time.perf_counter()
            self._recorded.append(step)
            self._is_recording = True

    def has(self, step: int) -> bool:
        """Returns whether `step` is recorded; the same on every rank."""
        return step in self._recorded

    def ends_with(self, step: int) -> bool:
        """Returns whether `step` is the last of the steps."""
        return self._steps is not None and step == self._steps[1]

    # ---- events --------------------------------------------------------------------------------------------------

    def phase(self, name: str, start: float, end: float) -> None:
        """Records a phase of this rank."""
        if self._is_recording:
            self._add(Event(kind="phase", name=name, start=start, end=end))

    @contextlib.contextmanager
    def recorded(self, name: str) -> Iterator[None]:
        """Records the block as a phase of this rank."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.phase(name, start, time.perf_counter())

    def request_begins(self, id: str, name: str, server: int) -> None:
        """Records that a request is sent. id: unique to the job. name: what is asked for, as the trace shows it."""
        now = time.perf_counter()
        with self._lock:
            self._requests[id] = Event(kind="request", name=name, start=now, end=now, server=server)

    def request_ends(self, id: str, details: Mapping[str, Any]) -> None:
        """Records that a request was answered, lost or cancelled; `details` say which."""
        with self._lock:
            begun = self._requests.pop(id)
        self._add(replace(begun, end=time.perf_counter(), details=details))

    def state(self, server: int, url: str, name: str, detail: str) -> None:
        """Records that a server changes its state."""
        now = time.perf_counter()
        with self._lock:
            before, self._urls[server] = self._states.get(server), url
            self._states[server] = Event(
                kind="state", name=name, start=now, end=now, server=server, details={"detail": detail}
            )
        if before is not None:
            self._add(replace(before, end=now))

    def pause(self, server: int, start: float) -> None:
        """Records that a server was being paused since `start`, within its present state."""
        self._add(Event(kind="state", name="pausing", start=start, end=time.perf_counter(), server=server))

    def _add(self, event: Event) -> None:
        if self._is_recording:
            with self._lock:
                self._events.append(event)

    # ---- the trace -----------------------------------------------------------------------------------------------

    def take(self, *, is_last: bool) -> Recording:
        """Returns the events since the last call, and forgets them.

        is_last: end the recording; requests and states that go on are among the events.
        """
        with self._lock:
            events, self._events = self._events, []
            if is_last:
                self._is_recording, now = False, time.perf_counter()
                events += [replace(event, end=now) for event in self._states.values()]
                details = {"finish": "under way at the end of the recording"}
                events += [replace(event, end=now, details=details) for event in self._requests.values()]
            urls = dict(self._urls)
        host = socket.gethostname()
        return Recording(rank=self._rank, host=host, wall_offset=self._wall_offset, events=events, urls=urls)

    def keep(self, recordings: Sequence[Recording]) -> None:
        """Keeps the recordings of a step for the trace. Called on the main rank."""
        self._gathered += recordings

    def write(self) -> None:
        """Writes the trace of what was kept, if anything was.

        Raises:
            OSError: the disk refused.
        """
        if not self._gathered or self._directory is None:
            return
        recordings, self._gathered = self._gathered, []
        first, last = self._recorded[0], self._recorded[-1]
        path = self._directory / f"steps_{first:06d}_{last:06d}.json"
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, json.dumps(trace(recordings, origin=self._origin)) + "\n")
        logger.info("timeline of steps %d to %d: %s", first, last, path)

    def close(self) -> None:
        """Writes the trace of a run that ends before the last of the steps, on the main rank; an error is logged."""
        if not self._is_recording:
            return
        recording = self.take(is_last=True)
        if self._rank == 0:
            self.keep([recording])
            try:
                self.write()
            except OSError as error:
                logger.error("%s", error)


def trace(recordings: Sequence[Recording], *, origin: float) -> dict[str, Any]:
    """Returns a trace in Chrome's JSON format.

    recordings: those of the main rank first. origin: time of the main rank at which the trace begins; earlier parts of
    its events are cut off, and `seconds` of an event has its whole length.
    """
    main = recordings[0]
    num_ranks = max(recording.rank for recording in recordings) + 1
    urls = {server: url for recording in recordings for server, url in recording.urls.items()}
    requests: dict[int, list[Event]] = defaultdict(list)
    found: list[dict[str, Any]] = []
    hosts: dict[int, str] = {}
    for recording in recordings:
        hosts[recording.rank] = recording.host
        # Processes of one host share the clock, which the wall clock, measured at two instants, would only blur.
        shift = 0.0 if recording.host == main.host else recording.wall_offset - main.wall_offset
        for event in recording.events:
            event = replace(event, start=event.start + shift - origin, end=event.end + shift - origin)
            if event.end < 0:
                continue
            if event.server is None:
                found.append(_slice(event, recording.rank, _PHASES))
            elif event.kind == "state":
                if recording.rank == main.rank:  # the others know of a server what the main rank has told them
                    found.append(_slice(event, num_ranks + event.server, _STATES))
            else:
                requests[event.server].append(event)
    for rank, host in sorted(hosts.items()):
        found += _named(rank, f"trainer rank {rank} on {host}", {_PHASES: "phases"})
    for server, url in sorted(urls.items()):
        process, rows = num_ranks + server, _rows(requests[server])
        names = {_STATES: "state"} | {_REQUESTS + row: f"requests {row}" for row in set(rows)}
        found += _named(process, f"server {server} at {url}", names)
        found += [_slice(event, process, _REQUESTS + row) for event, row in zip(requests[server], rows, strict=True)]
        found += _under_way(requests[server], process)
    return {
        # The viewers nest slices that begin together by their order.
        "traceEvents": sorted(found, key=lambda entry: (entry.get("ts", 0.0), -entry.get("dur", 0.0))),
        "displayTimeUnit": "ms",
        "otherData": {
            "origin": f"{origin + main.wall_offset:.6f} seconds since 1970, by the clock of {main.host}",
            "clocks": "Ranks of other hosts are placed by their hosts' own time of day, measured once.",
        },
    }


def _slice(event: Event, process: int, thread: int) -> dict[str, Any]:
    start = max(event.start, 0.0)
    return {
        "ph": "X",
        "cat": event.kind,
        "name": event.name,
        "pid": process,
        "tid": thread,
        "ts": start * _MICROSECONDS,
        "dur": (event.end - start) * _MICROSECONDS,
        "args": {"seconds": event.end - event.start, **event.details},
    }


def _named(process: int, name: str, threads: Mapping[int, str]) -> list[dict[str, Any]]:
    """Returns the entries that name a process and its rows, and keep them in the order of their numbers."""
    entries: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "pid": process, "args": {"name": name}},
        {"ph": "M", "name": "process_sort_index", "pid": process, "args": {"sort_index": process}},
    ]
    for thread, label in sorted(threads.items()):
        entries.append({"ph": "M", "name": "thread_name", "pid": process, "tid": thread, "args": {"name": label}})
        order = {"sort_index": thread}
        entries.append({"ph": "M", "name": "thread_sort_index", "pid": process, "tid": thread, "args": order})
    return entries


def _rows(requests: Sequence[Event]) -> list[int]:
    """Returns a row for each request, so that those of one row do not overlap and the rows are as few as possible."""
    rows = [0] * len(requests)
    busy: list[tuple[float, int]] = []
    free: list[int] = []
    for index in sorted(range(len(requests)), key=lambda i: requests[i].start):
        while busy and busy[0][0] <= requests[index].start:
            heapq.heappush(free, heapq.heappop(busy)[1])
        rows[index] = heapq.heappop(free) if free else len(busy)
        heapq.heappush(busy, (requests[index].end, rows[index]))
    return rows


def _under_way(requests: Sequence[Event], process: int) -> list[dict[str, Any]]:
    """Returns the entries of the counter of requests under way at a server."""
    changes = sorted([(max(event.start, 0.0), 1) for event in requests] + [(event.end, -1) for event in requests])
    entries, number = [], 0
    for time_, change in changes:
        number += change
        values = {"requests": number}
        entries.append(
            {"ph": "C", "name": "requests under way", "pid": process, "ts": time_ * _MICROSECONDS, "args": values}
        )
    return entries
