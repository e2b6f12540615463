"""Verdicts on disk, addressed by everything that they depend on. Only decided ones: UNDECIDED may pass."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import sqlite3
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from oreal_megatron.types import Verdict
from oreal_megatron.verifier.outcome import Outcome

_BUSY_SECONDS = 5.0
_QUERY_KEYS = 500

logger = logging.getLogger(__name__)


@functools.cache
def code_digest() -> str:
    """A digest of what decides a verdict: this package's source and the versions of what it stands on."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(source.read_bytes())
    for package in ("sympy", "mpmath", "latex2sympy2_extended"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            digest.update(importlib.metadata.version(package).encode())
    return digest.hexdigest()


def cache_key(*parts: object) -> str:
    """A digest of the parts and of the code; text with broken unicode has one too."""
    text = json.dumps([code_digest(), *parts], ensure_ascii=True, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class VerdictCache:
    """An SQLite file that several processes of one machine may share. Where it fails, grading goes on without it."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._owner = 0
        self._broken = False

    def get(self, keys: Sequence[str]) -> dict[str, Outcome]:
        """The known ones among the keys."""
        found: dict[str, Outcome] = {}
        with self._lock:
            try:
                for start in range(0, len(keys), _QUERY_KEYS):
                    some = keys[start : start + _QUERY_KEYS]
                    marks = ",".join("?" * len(some))
                    rows = self._open().execute(
                        f"SELECT key, verdict, reason, stage FROM verdicts WHERE key IN ({marks})", some
                    )
                    found.update(
                        (key, Outcome(Verdict(verdict), reason, stage)) for key, verdict, reason, stage in rows
                    )
            except (sqlite3.Error, OSError, ValueError) as error:
                self._give_up(error)
        return found

    def put(self, outcomes: Mapping[str, Outcome]) -> None:
        """Remember the decided ones."""
        rows = [
            (key, str(outcome.verdict), outcome.reason.encode("utf-8", "replace").decode(), outcome.stage)
            for key, outcome in outcomes.items()
            if outcome.verdict is not Verdict.UNDECIDED
        ]
        if not rows:
            return
        with self._lock:
            try:
                with self._open() as connection:
                    connection.executemany("INSERT OR REPLACE INTO verdicts VALUES (?, ?, ?, ?)", rows)
            except (sqlite3.Error, OSError) as error:
                self._give_up(error)

    def close(self) -> None:
        """Close the file. A later call opens it anew."""
        with self._lock:
            if self._connection is not None and self._owner == os.getpid():
                self._connection.close()
            self._connection = None

    def _open(self) -> sqlite3.Connection:
        if self._broken:
            raise sqlite3.OperationalError("given up")
        if self._connection is None or self._owner != os.getpid():  # SQLite must not cross a fork
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(self.path, timeout=_BUSY_SECONDS, check_same_thread=False)
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=OFF")  # what a power failure takes is computed again
            self._connection.execute(
                "CREATE TABLE IF NOT EXISTS verdicts (key TEXT PRIMARY KEY, verdict TEXT, reason TEXT, stage TEXT)"
            )
            self._owner = os.getpid()
        return self._connection

    def _give_up(self, error: Exception) -> None:
        if not self._broken:
            logger.warning(
                "verifier.cache_path %s does not work (%s); grading goes on without a cache", self.path, error
            )
        self._broken = True
