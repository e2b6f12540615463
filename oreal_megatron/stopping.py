"""Stopping on request: what the scheduler's signal means to a run.

A scheduler announces the time limit, or a preemption, with a signal (SLURM: `--signal=USR1@600`, or SIGTERM). The
run then stops at the next point from which it loses nothing, saves a checkpoint and exits with `EXIT_STOPPED`.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType

EXIT_STOPPED = 75
"""Exit status of a run that a signal stopped, everything saved: the same command goes on (EX_TEMPFAIL)."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Stopped(Exception):
    """The run was asked to stop, and can be resumed."""


class LostPeer(RuntimeError):
    """This rank is well, but another one of its job is not."""


class StopRequest:
    """Whether this process was asked to stop. One process of a job is enough: the ranks agree where they check."""

    def __init__(self) -> None:
        self.signal: str | None = None
        """Name of the first signal that came."""

    @property
    def is_made(self) -> bool:
        return self.signal is not None

    @contextlib.contextmanager
    def on_signals(self) -> Iterator[None]:
        """Inside, SIGTERM and SIGUSR1 are requests to stop."""
        before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal = signal.Signals(number).name
            # Not through the console, whose lock the interrupted code may hold.
            os.write(2, f"{self.signal}: stopping as soon as nothing is lost by it\n".encode())
