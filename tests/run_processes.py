"""Runs of the command line that can be killed, forked from a process that has imported everything already."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.tiny import FORKS, TINY, command_in_fork


def wait_until(true: Callable[[], object], seconds: float = 60) -> None:
    """Waits until a condition is true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"waited for {seconds} s"
        time.sleep(0.05)


class RunProcess:
    """A start of `oreal-train` on the tiny experiment, in its own process session."""

    _earlier = 0

    def __init__(
        self,
        directory: Path,
        *overrides: str,
        max_file_bytes: int | None = None,
        environment: Mapping[str, str] | None = None,
    ):
        self.log = directory.with_name(f"{directory.name}.log")
        self._earlier = len(self.said())
        arguments = (*TINY, f"run.dir={directory}", *overrides)
        self._process = FORKS.Process(target=_run, args=(arguments, str(self.log), max_file_bytes, environment or {}))
        self._process.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_over(self) -> bool:
        return self._process.exitcode is not None

    def wait(self, seconds: float = 480) -> int:
        """The exit status."""
        self._process.join(seconds)
        assert self._process.exitcode is not None, f"still running after {seconds} s:\n{self.said()}"
        return self._process.exitcode

    def wait_until(self, true: Callable[[], bool], seconds: float = 300) -> bool:
        """Waits until a condition is true; returns False if the process ends first."""
        end = time.monotonic() + seconds
        while not self.is_over:
            if true():
                return True
            assert time.monotonic() < end, f"waited for {seconds} s:\n{self.said()}"
            time.sleep(0.002)
        return False

    def kill(self, *, with_children: bool = True) -> None:
        """kill -9; without its children, the process that writes a checkpoint lives on."""
        (os.killpg if with_children else os.kill)(self._process.pid, signal.SIGKILL)
        assert self.wait() == -signal.SIGKILL

    def signal(self, number: signal.Signals, *, with_children: bool = False) -> None:
        (os.killpg if with_children else os.kill)(self._process.pid, number)

    def said(self) -> str:
        """Output of this start."""
        return self.log.read_text()[self._earlier :] if self.log.is_file() else ""


def start_ranks(directory: Path, *overrides: str, num_processes: int) -> list[RunProcess]:
    """Starts the ranks of a job; they share one log."""
    if num_processes == 1:
        return [RunProcess(directory, *overrides)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        job = {"WORLD_SIZE": str(num_processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    return [
        RunProcess(directory, *overrides, environment={**job, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(num_processes)
    ]


def together(directory: Path, *overrides: str, num_processes: int) -> str:
    """Runs the ranks of a job to their successful end; returns the output of rank 0."""
    ranks = start_ranks(directory, *overrides, num_processes=num_processes)
    assert [rank.wait() for rank in ranks] == [0] * num_processes, ranks[0].said()
    return ranks[0].said()


def _run(arguments: tuple[str, ...], log: str, max_file_bytes: int | None, environment: Mapping[str, str]) -> None:
    os.environ.update(environment)
    os.setsid()
    if max_file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))
    command_in_fork(arguments, log, log)


def journalled(directory: Path) -> list[str]:
    """The units in a run's journal, each with its batch: two evaluations of the same weights have the same units."""
    paths = (directory / "journal").glob("*.replica_*.jsonl")
    lines = [(path.name.split(".")[0], line) for path in paths for line in path.read_text().split("\n")[:-1]]
    return [f"{batch} {json.loads(line)['unit']}" for batch, line in lines]


def trajectories_of(directory: Path) -> dict[str, list[dict[str, Any]]]:
    """Every trajectory and evaluation file, without times."""
    found = {}
    for path in sorted([*directory.glob("trajectories/*.jsonl"), *directory.glob("evaluations/*.jsonl")]):
        records = [json.loads(line) for line in path.read_text().splitlines()]
        for record in records:
            del record["grade"]["seconds"]
        found[path.name] = records
    return found


def content_of(checkpoint: Path) -> dict[str, Any]:
    """Every tensor (as its bytes) and value of a checkpoint, whole, by name. Needs a process group."""
    from megatron.core import dist_checkpointing

    tensors = dist_checkpointing.load_plain_tensors(str(checkpoint))
    return dict(_flat({**tensors, "common": dist_checkpointing.load_common_state_dict(str(checkpoint))}))


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from _flat(inner, f"{path}/{key}")
    else:
        yield path, value.numpy().tobytes() if hasattr(value, "numpy") else value
