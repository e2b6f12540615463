"""Logging of a run: the console shows the main rank, and every rank writes a file of its own.

Modules log with `logging.getLogger(__name__)`; levels are the standard library's. A line on the console and in
`run.dir/logs/rank_0003.log` has the time, the rank and the level:

    2026-11-28 17:03:07 rank 3 WARNING oreal_megatron.train: ...
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

PACKAGE = "oreal_megatron"
_STYLES = {logging.WARNING: "yellow", logging.ERROR: "red", logging.CRITICAL: "bold red"}


class ConsoleHandler(logging.Handler):
    """Prints through a rich console, so that lines appear above a running progress bar, coloured by level."""

    def __init__(self, console: Console):
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._console.print(self.format(record), style=_STYLES.get(record.levelno), markup=False, highlight=False)
        except Exception:
            self.handleError(record)


@contextlib.contextmanager
def run_logging(directory: Path, *, rank: int, level: str, console: Console | None) -> Iterator[None]:
    """Logs the package's messages to `directory`/logs/rank_NNNN.log, and to `console` where one is given.

    level: lowest level that is shown and written, such as `INFO`.

    Raises:
        OSError: the log file cannot be opened.
    """
    logs = directory / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    # A line on the console leaves the module out.
    formats = {"file": f"%(asctime)s rank {rank} %(levelname)s %(name)s: %(message)s"}
    formats["console"] = f"%(asctime)s rank {rank} %(levelname)s %(message)s"
    handlers: dict[str, logging.Handler] = {
        "file": logging.FileHandler(logs / f"rank_{rank:04d}.log", encoding="utf-8"),
        **({} if console is None else {"console": ConsoleHandler(console)}),
    }
    logger = logging.getLogger(PACKAGE)
    before = logger.level, logger.propagate
    logger.setLevel(level)
    logger.propagate = False  # the root logger's handlers, for example Hydra's, would show each line again
    for name, handler in handlers.items():
        handler.setFormatter(logging.Formatter(formats[name], datefmt="%Y-%m-%d %H:%M:%S"))
        logger.addHandler(handler)
    try:
        yield
    finally:
        for handler in handlers.values():
            logger.removeHandler(handler)
            handler.close()
        logger.level, logger.propagate = before


def quiet_libraries() -> None:
    """Silences what libraries say at import and for every request; their errors still show."""
    warnings.filterwarnings("ignore", module=r"megatron\..*")
    warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine|ShardedTensor).*")
    # Calls of Megatron-Core that newer torches deprecate; the caller that the warning names is torch itself.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.", FutureWarning)
    logging.getLogger("megatron").setLevel(logging.ERROR)
    logging.getLogger("httpx").setLevel(logging.WARNING)
