"""How commands end: with a status, and with one plain message where something is wrong."""

from __future__ import annotations

import sys
from collections.abc import Callable

from oreal_megatron.config import ConfigError


def reporting(run: Callable[[], int]) -> None:
    """Ends with the status that `run` returns, or with 1 and a plain message."""
    try:
        sys.exit(run())
    except (ConfigError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
