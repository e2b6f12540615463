"""Ends of commands: a status, and one message on stderr where something went wrong."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import NoReturn

from oreal_megatron.config import ConfigError
from oreal_megatron.stopping import EXIT_STOPPED, LostPeer, Stopped

TRACEBACK = "OREAL_TRACEBACK"
"""Environment variable that shows the traceback of an error when it is 1."""
EXIT_INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells report it."""


def run_command(command: Callable[[], int | None], *, continues: bool = False) -> NoReturn:
    """Runs a command and ends the process with its status, or as `ending_on_errors` does."""
    with ending_on_errors(continues=continues):
        status = command()
    sys.exit(status)


@contextlib.contextmanager
def ending_on_errors(*, continues: bool) -> Iterator[None]:
    """Ends the process on an error inside, with a status and one message.

    A stop request ends with status 75, Ctrl-C with 130, an expected error with 1. Unexpected errors pass through.

    continues: whether the same command, started again, continues where it was interrupted.
    """
    try:
        yield
    except Stopped as stopped:
        _end(str(stopped), EXIT_STOPPED)
    except KeyboardInterrupt:
        _show_traceback()
        _end("interrupted; the same command continues" if continues else "interrupted", EXIT_INTERRUPTED)
    except ConfigError as error:
        _show_traceback()
        # All ranks of a job have the same configuration, so only the first one prints what is wrong with it everywhere.
        prints = error.host is not None or os.environ.get("RANK", "0") == "0"
        _end(f"error: {error}" if prints else "", 1)
    except LostPeer as lost:
        _show_traceback()
        _end(str(lost), 1)
    except (ValueError, ArithmeticError, OSError) as error:
        hint = "" if _show_traceback() else f"\n({TRACEBACK}=1 shows the traceback)"
        _end(f"error: {error}{hint}", 1)


def _show_traceback() -> bool:
    """Prints the traceback of the current error if the user asked for it. Returns whether it did."""
    if os.environ.get(TRACEBACK) != "1":
        return False
    traceback.print_exc()
    return True


def _end(message: str, status: int) -> NoReturn:
    if message:
        print(message, file=sys.stderr)
    sys.exit(status)
