"""The rollout servers of one node of a SLURM job: starts them, restarts those that end, and stops them all."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from oreal_megatron.config import SGLangConfig, TrainConfig
from oreal_megatron.files import write_atomically
from oreal_megatron.servers.server_process import (
    Launcher,
    ServerProcess,
    choose_port,
    listening_address,
    offloaded_mark,
    server_url,
    start_directory,
)
from oreal_megatron.weight_sync.sglang_layout import LOADER

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.5


def servers_of_node(num_servers: int, node: int, num_nodes: int) -> range:
    """Returns the indices of the servers on node `node` of `num_nodes`."""
    per_node = ceil(num_servers / num_nodes)
    return range(min(node * per_node, num_servers), min((node + 1) * per_node, num_servers))


@dataclass
class _Server:
    """A server of this node, running or not."""

    number: int
    """Number of the server among those of this node."""
    index: int
    """Number of the server among those of the run."""
    port: int
    num_restarts: int = 0
    """Restarts in a row: a server that ran for rollout.sglang.startup_seconds begins again at 0."""
    process: ServerProcess | None = None
    """Child process; None before the first start and between two starts."""
    started: float = 0.0
    """Time of the last start, of time.monotonic()."""
    has_failed: bool = False
    """Whether it ended too often to be started again."""


class NodeServers:
    """Runs the servers of one node until it is asked to end.

    Servers are announced before they run. A server that ends is restarted, up to rollout.sglang.max_restarts times in a
    row.
    """

    def __init__(
        self,
        config: TrainConfig,
        servers: SGLangConfig,
        indices: Sequence[int],
        *,
        host: str,
        logs: Path,
        kv_tokens: int | None,
        ending: threading.Event,
    ):
        """host: name or address by which the trainer reaches this node. kv_tokens: see Launcher."""
        self._host = host
        self._config = servers.model_copy(update={"host": listening_address(host)})
        self._ending = ending
        self._launcher = Launcher(
            config=self._config,
            model=start_directory(Path(config.run.dir) / "servers"),
            weight_loader=LOADER,
            dtype=config.served_dtype,
            max_sequence_length=config.model.max_sequence_length,
            logs=logs,
            kv_tokens=kv_tokens,
        )
        self._servers = [
            _Server(number, index, choose_port(self._config, number)) for number, index in enumerate(indices)
        ]

    def announce(self, directory: Path) -> None:
        """Writes the URL of every server into a file of `directory`, before the servers run."""
        for server in self._servers:
            url = server_url(self._host, server.port)
            write_atomically(directory / f"server_{server.index:04d}.url", url + "\n")
            logger.info("server %d at %s", server.index, url)

    def run(self) -> int:
        """Runs the servers until the end is asked for. Returns the exit status: 1 if every server has failed."""
        try:
            while not self._ending.wait(_POLL_SECONDS):
                for server in self._servers:
                    self._keep_running(server)
                if all(server.has_failed for server in self._servers):
                    return 1
            return 0
        finally:
            for server in self._servers:
                if server.process is not None:
                    server.process.stop()

    def _keep_running(self, server: _Server) -> None:
        """Starts the server if it is not running and may be started."""
        if server.has_failed or (server.process is not None and server.process.exit_code is None):
            return
        if server.process is not None:
            logger.warning(
                "server %d ended with status %d:\n%s", server.index, server.process.exit_code, server.process.log_tail()
            )
            server.process.stop()
            server.process = None
            if time.monotonic() - server.started > self._config.startup_seconds:
                server.num_restarts = 0
            server.num_restarts += 1
            if server.num_restarts > self._config.max_restarts:
                logger.error("server %d failed: it ended %d times in a row", server.index, server.num_restarts)
                server.has_failed = True
                return
        model = self._launcher.model
        may_start = not (self._config.shares_devices and offloaded_mark(model).exists())
        if may_start and (model / "config.json").is_file():
            self._start(server)

    def _start(self, server: _Server) -> None:
        server.process = self._launcher.start(server.index, server.port, place=server.number)
        server.started = time.monotonic()
        logger.info("server %d starts; log: %s", server.index, server.process.log)
