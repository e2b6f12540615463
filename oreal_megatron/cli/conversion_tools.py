"""What the three tools share: errors as one line, and a progress bar."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn


def run(main: Callable[[], int | None]) -> None:
    """Ends the process with main's status; an error that the user can mend is one line (OREAL_TRACEBACK=1: all)."""
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        if os.environ.get("OREAL_TRACEBACK") == "1":
            raise
        print(f"error: {error}\n(OREAL_TRACEBACK=1 shows where)", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        sys.exit(130)


@contextlib.contextmanager
def progress_bar(title: str, num_bytes: int) -> Iterator[Callable[[int], None]]:
    """A bar of bytes on stderr; gives the function that advances it."""
    columns = (TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=num_bytes)
        yield lambda done: progress.advance(task, done)
