"""Choice of the endpoint for the next request: in turn, without those that keep failing."""

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
    open_until: float = 0.0


class Endpoints:
    """Endpoints with a circuit breaker each: it opens after `max_failures` failures in a row.

    After `open_seconds` one request may try the endpoint again.
    """

    def __init__(
        self, urls: Sequence[str], max_failures: int, open_seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._endpoints = [_Endpoint(url.rstrip("/")) for url in urls]
        self._max_failures = max_failures
        self._open_seconds = open_seconds
        self._clock = clock
        self._next = 0
        self._lock = threading.Lock()

    def pick(self) -> str | None:
        """Returns the next endpoint whose breaker lets a request through, or None."""
        with self._lock:
            now = self._clock()
            for _ in self._endpoints:
                endpoint = self._endpoints[self._next % len(self._endpoints)]
                self._next += 1
                if endpoint.open_until <= now:
                    if endpoint.failures >= self._max_failures:
                        endpoint.open_until = now + self._open_seconds
                    return endpoint.url
            return None

    def succeeded(self, url: str) -> None:
        """Records a verdict of the endpoint, which closes its breaker."""
        with self._lock:
            endpoint = self._of(url)
            endpoint.failures, endpoint.open_until = 0, 0.0

    def failed(self, url: str) -> None:
        """Records a failure of the endpoint, which opens its breaker after `max_failures` in a row."""
        with self._lock:
            endpoint = self._of(url)
            endpoint.failures += 1
            if endpoint.failures == self._max_failures:
                logger.warning(
                    "endpoint %s failed %d times in a row and is not used for %g s",
                    url,
                    endpoint.failures,
                    self._open_seconds,
                )
            if endpoint.failures >= self._max_failures:
                endpoint.open_until = self._clock() + self._open_seconds

    def _of(self, url: str) -> _Endpoint:
        return next(endpoint for endpoint in self._endpoints if endpoint.url == url)
