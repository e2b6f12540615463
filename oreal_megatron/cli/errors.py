"""Ends of commands: a status, and one message on stderr where something went wrong."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from oreal_megatron.config import ConfigError
from oreal_megatron.stopping import EXIT_STOPPED, LostPeer, Stopped

TRACEBACK = "OREAL_TRACEBACK"
"""Environment variable that shows the traceback of an error when it is 1."""
EXIT_INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells report it."""


def run_command(command: Callable[[], int | None], *, continues: bool = False) -> NoReturn:
    """Runs a command and ends the process with its status.

    A stop request ends with status 75, Ctrl-C with 130, an expected error with 1 and its message. Unexpected errors
    pass through with their traceback.

    continues: whether the same command, started again, continues where it was interrupted.
    """
    try:
        status = command()
    except Stopped as stopped:
        _end(str(stopped), EXIT_STOPPED)
    except KeyboardInterrupt:
        _show_traceback()
        _end("interrupted; the same command continues" if continues else "interrupted", EXIT_INTERRUPTED)
    except ConfigError as error:
        _show_traceback()
        # All ranks of a job have the same configuration, so only the first one prints what is wrong with it.
        is_first = os.environ.get("RANK", "0") == "0"
        _end(f"error: {error}" if is_first else "", 1)
    except LostPeer as lost:
        _show_traceback()
        _end(str(lost), 1)
    except (ValueError, ArithmeticError, OSError) as error:
        if not _show_traceback():
            _end(f"error: {error}\n({TRACEBACK}=1 shows the traceback)", 1)
        _end(f"error: {error}", 1)
    sys.exit(status)


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
