"""Endpoint for Prometheus: the latest metrics of a run, served by its main process."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Metric, start_http_server
from prometheus_client.registry import Collector

from oreal_megatron.config import ConfigError, Violation


def metric_name(name: str) -> str:
    """Returns the name of a metric in Prometheus.

    It is `oreal_` and the metric's name, in which every character that is no ASCII letter, digit or `_` is `_`.
    """
    return "oreal_" + re.sub(r"[^a-zA-Z0-9_]", "_", name)


class PrometheusEndpoint(Collector):
    """Serves the latest values of a run as gauges on `/metrics`, on every IPv4 address of the host, until closed."""

    def __init__(self, port: int, *, run: str):
        """Starts to serve. run: value of the label `run` of every metric.

        Raises:
            ConfigError: the port cannot be opened on this host.
        """
        self._run = run
        self._started = time.time()
        # Values by metric and benchmark ("": none). Each is replaced as a whole, while the server's threads read it.
        self._of_step: Mapping[tuple[str, str], float] = {}
        self._of_evaluation: Mapping[tuple[str, str], float] = {}
        registry = CollectorRegistry()
        registry.register(self)
        try:
            self._server, self._thread = start_http_server(port, registry=registry)
        except OSError as error:
            remedy = f"The port cannot be opened: {error.strerror}. Set it to a free port, or to null for no endpoint."
            violation = Violation("tracking.prometheus_port", port, remedy)
            raise ConfigError([violation], host=socket.gethostname()) from error

    def step(self, values: Mapping[str, float], step: int) -> None:
        """Serves the values of a step in place of those of the step before it."""
        own = {"step": step, "last_step_timestamp_seconds": time.time()}
        self._of_step = {(name, ""): value for name, value in {**values, **own}.items()}

    def evaluation(self, values: Mapping[str, float], step: int) -> None:
        """Serves an evaluation in place of the one before it. values: `benchmark/name` -> value."""
        served: dict[tuple[str, str], float] = {("evaluation/step", ""): step}
        for name, value in values.items():
            benchmark, _, kind = name.rpartition("/")
            served[f"evaluation/{kind}", benchmark] = value
        self._of_evaluation = served

    def collect(self) -> Iterable[Metric]:
        """Returns the gauges with their values, for prometheus_client. Where two names become one, the later stays."""
        families: dict[str, dict[str, tuple[str, float]]] = {}
        start = {("start_timestamp_seconds", ""): self._started}
        for (name, benchmark), value in {**start, **self._of_step, **self._of_evaluation}.items():
            families.setdefault(metric_name(name), {})[benchmark] = (name, value)
        for served, samples in families.items():
            metric = Metric(served, f"{next(iter(samples.values()))[0]} of docs/metrics.md", "gauge")
            for benchmark, (_, value) in samples.items():
                metric.add_sample(served, {"run": self._run} | ({"benchmark": benchmark} if benchmark else {}), value)
            yield metric

    def close(self) -> None:
        """Ends the server and its thread, and frees the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
