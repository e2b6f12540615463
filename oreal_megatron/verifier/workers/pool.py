"""A pool of killable processes that compare answers; each comparison has a hard time limit.

Nothing is forked from this process, which may hold threads and devices: children come from the server in `worker`.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

from oreal_megatron.types import Verdict
from oreal_megatron.verifier.outcome import Outcome, unknown
from oreal_megatron.verifier.workers import protocol

_START_SECONDS = 120.0
_STOP_SECONDS = 5.0


Job = tuple[str, tuple[str, ...], tuple[str, ...]]
"""Gold answer, final answers, earlier boxes."""


@dataclass
class Timed:
    """An outcome with the wall seconds it took, and whether it was the time limit that ended it."""

    outcome: Outcome
    seconds: float
    timed_out: bool = False


@dataclass
class _Worker:
    process: int
    connection: Connection
    job: int = -1
    started: float = 0.0


class _Server:
    """The forking server: one subprocess and its control socket."""

    def __init__(self, memory_limit_mb: int) -> None:
        ours, theirs = socket.socketpair()
        package_root = str(Path(__file__).resolve().parents[3])
        environment = dict(
            os.environ, PYTHONPATH=os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
        )
        with theirs:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-P",
                    "-m",
                    "oreal_megatron.verifier.workers.worker",
                    str(theirs.fileno()),
                    str(memory_limit_mb),
                ],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,  # Ctrl-C in the terminal is the trainer's to handle
            )
        self.control = ours
        ours.settimeout(_START_SECONDS)
        try:
            ready = ours.recv(protocol.REPLY.size)
        except TimeoutError:
            ready = b""
        if len(ready) < protocol.REPLY.size:
            self.stop()
            raise RuntimeError(
                f"the verifier's worker server did not start (exit code {self.process.returncode}): "
                "see its error above; are sympy and latex2sympy2_extended installed?"
            )

    def fork(self) -> _Worker:
        """A fresh child with a connection of its own."""
        ours, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(self.control, [protocol.COMMAND.pack(protocol.FORK, 0)], [theirs.fileno()])
            reply = self.control.recv(protocol.REPLY.size)
        if len(reply) < protocol.REPLY.size:
            ours.close()
            raise ConnectionError("the verifier's worker server is gone")
        return _Worker(protocol.REPLY.unpack(reply)[0], Connection(ours.detach()))

    def kill(self, process: int) -> None:
        """Kill and reap a child; only its parent can do so without a race on the process id."""
        self.control.sendall(protocol.COMMAND.pack(protocol.KILL, process))
        self.control.recv(protocol.REPLY.size)

    def stop(self) -> None:
        """End the server, which ends its children."""
        self.control.close()
        try:
            self.process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@dataclass
class _Resources:
    """What must be released even if the pool is only garbage collected."""

    owner: int
    server: _Server | None = None
    workers: list[_Worker] | None = None


def _release(resources: _Resources) -> None:
    if resources.owner != os.getpid():
        return  # a fork of the owner holds copies of the sockets, not the processes
    for worker in resources.workers or ():
        worker.connection.close()
    resources.workers = None
    if resources.server is not None:
        resources.server.stop()
        resources.server = None


class WorkerPool:
    """Compares answers in processes that are started when first needed."""

    def __init__(self, num_workers: int, timeout_seconds: float, memory_limit_mb: int) -> None:
        self.num_workers = num_workers
        self.timeout_seconds = timeout_seconds
        self.memory_limit_mb = memory_limit_mb
        self.num_restarts = 0
        self._lock = threading.Lock()
        self._resources = _Resources(owner=os.getpid())
        self._finalizer = weakref.finalize(self, _release, self._resources)

    def close(self) -> None:
        """Stop all processes. A later comparison starts them anew."""
        with self._lock:
            _release(self._resources)

    def compare(self, jobs: Sequence[Job]) -> list[Timed]:
        """One outcome for each job, in order. Threads take turns."""
        if not jobs:
            return []
        with self._lock:
            results: list[Timed | None] = [None] * len(jobs)
            workers = self._started(min(self.num_workers, len(jobs)))
            pending = list(range(len(jobs) - 1, -1, -1))
            while pending or any(worker.job >= 0 for worker in workers):
                for worker in workers:
                    if worker.job < 0 and pending:
                        self._give(worker, pending, jobs, results)
                self._collect(workers, results)
            return [result or Timed(unknown("lost"), 0.0) for result in results]

    def _started(self, count: int) -> list[_Worker]:
        if self._resources.owner != os.getpid():
            self._resources = _Resources(owner=os.getpid())
            self._finalizer = weakref.finalize(self, _release, self._resources)
        server = self._resources.server
        if server is None or server.process.poll() is not None:
            _release(self._resources)
            self._resources.server = server = _Server(self.memory_limit_mb)
            self._resources.workers = []
        workers = self._resources.workers = self._resources.workers or []
        while len(workers) < count:
            workers.append(server.fork())
        return workers

    def _give(self, worker: _Worker, pending: list[int], jobs: Sequence[Job], results: list[Timed | None]) -> None:
        job = pending.pop()
        worker.job, worker.started = job, time.monotonic()
        try:
            worker.connection.send_bytes(json.dumps(jobs[job]).encode())
        except OSError:
            results[job] = Timed(unknown("the worker process died"), 0.0)
            self._replace(worker)

    def _collect(self, workers: list[_Worker], results: list[Timed | None]) -> None:
        """Take the replies that are there; kill what is over time."""
        busy = {worker.connection: worker for worker in workers if worker.job >= 0}
        if not busy:
            return
        next_deadline = min(worker.started for worker in busy.values()) + self.timeout_seconds
        for connection in wait(list(busy), max(0.0, next_deadline - time.monotonic())):
            worker = busy[connection]  # type: ignore[index]
            seconds = time.monotonic() - worker.started
            try:
                verdict, reason, stage = json.loads(worker.connection.recv_bytes())
                results[worker.job] = Timed(Outcome(Verdict(verdict), reason, stage), seconds)
                worker.job = -1
            except (EOFError, OSError):
                results[worker.job] = Timed(unknown("the worker process died"), seconds)
                self._replace(worker)
        for worker in busy.values():
            seconds = time.monotonic() - worker.started
            if worker.job >= 0 and seconds >= self.timeout_seconds:
                reason = f"the comparison took longer than {self.timeout_seconds:g} s"
                results[worker.job] = Timed(unknown(reason), seconds, timed_out=True)
                self._replace(worker)

    def _replace(self, worker: _Worker) -> None:
        """A fresh process in place of a dead or hanging one."""
        self.num_restarts += 1
        worker.connection.close()
        worker.job = -1
        server = self._resources.server
        assert server is not None
        try:
            server.kill(worker.process)
            fresh = server.fork()
        except OSError:
            with contextlib.suppress(OSError):
                server.stop()
            server = self._resources.server = _Server(self.memory_limit_mb)
            fresh = server.fork()
        worker.process, worker.connection = fresh.process, fresh.connection
