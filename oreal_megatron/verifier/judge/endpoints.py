"""Which judge endpoint to ask: in turn, leaving the failing ones alone for a while."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

logger = logging.getLogger(__name__)


@dataclass
class _Endpoint:
    url: str
    failures: int = 0
    closed_until: float = 0.0


class Endpoints:
    """A circuit breaker around each endpoint: after some failures in a row it rests, then one request tries it."""

    def __init__(
        self, urls: Sequence[str], max_failures: int, rest_seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._endpoints = [_Endpoint(url.rstrip("/")) for url in urls]
        self._max_failures = max_failures
        self._rest_seconds = rest_seconds
        self._clock = clock
        self._next = 0
        self._lock = threading.Lock()

    def pick(self) -> str | None:
        """The next endpoint in turn that is not resting, or None. A rested one is lent to one request at a time."""
        with self._lock:
            now = self._clock()
            for _ in self._endpoints:
                endpoint = self._endpoints[self._next % len(self._endpoints)]
                self._next += 1
                if endpoint.closed_until <= now:
                    if endpoint.failures >= self._max_failures:
                        endpoint.closed_until = now + self._rest_seconds
                    return endpoint.url
            return None

    def succeeded(self, url: str) -> None:
        """The endpoint gave a verdict: forget its failures."""
        with self._lock:
            endpoint = self._of(url)
            endpoint.failures, endpoint.closed_until = 0, 0.0

    def failed(self, url: str) -> None:
        """The endpoint gave none: after too many in a row it rests."""
        with self._lock:
            endpoint = self._of(url)
            endpoint.failures += 1
            if endpoint.failures == self._max_failures:
                logger.warning(
                    "judge %s failed %d times in a row; left alone for %g s", url, endpoint.failures, self._rest_seconds
                )
            if endpoint.failures >= self._max_failures:
                endpoint.closed_until = self._clock() + self._rest_seconds

    def _of(self, url: str) -> _Endpoint:
        return next(endpoint for endpoint in self._endpoints if endpoint.url == url)
