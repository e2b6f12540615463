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
    ServerStartError,
    choose_port,
    offloaded_mark,
    start_directory,
)
from oreal_megatron.weight_sync.sglang_layout import LOADER

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.5


def servers_of_node(num_servers: int, node: int, num_nodes: int) -> range:
    """Indices of the servers on node `node` of `num_nodes`."""
    per_node = ceil(num_servers / num_nodes)
    return range(min(node * per_node, num_servers), min((node + 1) * per_node, num_servers))


@dataclass
class _Place:
    """One server, running or not."""

    number: int
    """On this node."""
    index: int
    port: int
    num_restarts: int = 0
    """Restarts in a row: a server that ran for rollout.sglang.startup_seconds begins again at 0."""
    process: ServerProcess | None = None
    started: float = 0.0
    has_failed: bool = False


class NodeServers:
    """The servers of this node."""

    def __init__(
        self,
        config: TrainConfig,
        servers: SGLangConfig,
        indices: Sequence[int],
        *,
        host: str,
        logs: Path,
        ending: threading.Event,
    ):
        self._servers = servers.model_copy(update={"host": host})
        self._ending = ending
        self._launcher = Launcher(
            config=self._servers,
            model=start_directory(Path(config.run.dir) / "servers"),
            weight_loader=LOADER,
            dtype=config.served_dtype,
            max_sequence_length=config.model.max_sequence_length,
            logs=logs,
        )
        self._places = [
            _Place(number, index, choose_port(self._servers, number)) for number, index in enumerate(indices)
        ]

    def announce(self, directory: Path) -> None:
        """Says where the servers will be, before they are."""
        for place in self._places:
            url = f"http://{self._servers.host}:{place.port}"
            write_atomically(directory / f"server_{place.index:04d}.url", url + "\n")
            logger.info("server %d at %s", place.index, url)

    def run(self) -> int:
        """Until the end is asked for; the exit status: 1 where no server is left."""
        try:
            while not self._ending.wait(_POLL_SECONDS):
                for place in self._places:
                    self._look_after(place)
                if all(place.has_failed for place in self._places):
                    return 1
            return 0
        finally:
            for place in self._places:
                if place.process is not None:
                    place.process.stop()

    def _look_after(self, place: _Place) -> None:
        """Starts the server where it is not running, as often as it may."""
        if place.has_failed or (place.process is not None and place.process.exit_code is None):
            return
        if place.process is not None:
            logger.warning(
                "server %d ended with status %d:\n%s", place.index, place.process.exit_code, place.process.log_tail()
            )
            place.process.stop()
            place.process = None
            if time.monotonic() - place.started > self._servers.startup_seconds:
                place.num_restarts = 0
            place.num_restarts += 1
            if place.num_restarts > self._servers.max_restarts:
                logger.error("server %d failed: it ended %d times in a row", place.index, place.num_restarts)
                place.has_failed = True
                return
        model = self._launcher.model
        may_start = not (self._servers.shares_devices and offloaded_mark(model).exists())
        if may_start and (model / "config.json").is_file():
            self._start(place)

    def _start(self, place: _Place) -> None:
        try:
            place.process = self._launcher.start(place.index, place.port, place=place.number)
        except ServerStartError as error:
            raise ValueError(str(error)) from error
        place.started = time.monotonic()
        logger.info("server %d starts; log: %s", place.index, place.process.log)
