"""Stopping on request: signals of the scheduler ask a run to save and to end.

A scheduler announces the time limit, or a preemption, with a signal (SLURM: `--signal=USR1@600`, or SIGTERM). The
run then stops at the next point where nothing is lost, saves a checkpoint and exits with `EXIT_STOPPED`. Ctrl-C does
the same.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType

EXIT_STOPPED = 75
"""Exit status (EX_TEMPFAIL) of a run that a signal stopped; everything is saved, and the same command goes on."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Stopped(Exception):
    """Raised where the run was asked to stop; the message says what is saved."""


class TooManyUndecided(ValueError):
    """Raised on every rank where too many responses are UNDECIDED; they are graded again at the next start."""


class LostPeer(RuntimeError):
    """Raised on a rank that has no error itself, after another rank of the job failed."""


class StopRequest:
    """Request to stop this process. A request to any process of a job is enough: the ranks agree where they check."""

    def __init__(self) -> None:
        self.signal: str | None = None
        """Name of the first signal that was received; None if there was none."""

    @property
    def is_made(self) -> bool:
        return self.signal is not None

    @contextlib.contextmanager
    def on_signals(self) -> Iterator[None]:
        """Takes SIGTERM, SIGUSR1 and Ctrl-C as requests to stop, until the block is left.

        Ctrl-C after a request raises KeyboardInterrupt, and once more ends the process at once.
        """
        before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal = signal.Signals(number).name
            more = " (Ctrl-C again: at once)" if number == signal.SIGINT else ""
            # The interrupted code may hold the console's lock.
            os.write(2, f"{self.signal}: stopping as soon as nothing is lost{more}\n".encode())
        elif number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)  # for code that does not return to the interpreter
            raise KeyboardInterrupt
