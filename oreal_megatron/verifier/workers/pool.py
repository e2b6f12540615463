"""A pool of killable processes that compare answers; each comparison has a hard time limit.

The trainer may hold threads and devices, so it is never forked: the workers are children of the server in `worker`.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

from oreal_megatron.stopping import SIGNALS
from oreal_megatron.types import Verdict
from oreal_megatron.verifier.outcome import Outcome, unknown

_START_SECONDS = 120.0
_STOP_SECONDS = 5.0
_IMPORT_ROOT = Path(__file__).resolve().parents[3]
_SERVER_MODULE = "oreal_megatron.verifier.workers.worker"

FORK, KILL = b"F", b"K"
COMMAND = struct.Struct("!cq")
"""A command to the server: FORK with 0 and the worker's end of a socket, or KILL with a process id."""
REPLY = struct.Struct("!q")
"""The server's reply to a command: a process id."""

Job = tuple[str, tuple[str, ...], tuple[str, ...]]
"""Gold answer, final answers, earlier boxes."""


@dataclass
class Timed:
    """An outcome with the wall seconds it took, and whether the time limit ended the comparison."""

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
    """The forking server: a subprocess, its control socket, and the workers forked so far."""

    def __init__(self, memory_limit_mb: int) -> None:
        self.owner = os.getpid()
        self.workers: list[_Worker] = []
        self.control, theirs = socket.socketpair()
        import_path = os.pathsep.join(filter(None, [str(_IMPORT_ROOT), os.environ.get("PYTHONPATH")]))
        # A scheduler's signals, and Ctrl-C, go to all processes of a job; the trainer handles them and ends its server.
        # The server and its workers inherit the mask.
        unmasked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            with theirs:
                self.process = subprocess.Popen(
                    [sys.executable, "-P", "-m", _SERVER_MODULE, str(theirs.fileno()), str(memory_limit_mb)],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    env={**os.environ, "PYTHONPATH": import_path},
                )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, unmasked)
        self.control.settimeout(_START_SECONDS)
        try:
            ready = self.control.recv(REPLY.size)
        except TimeoutError:
            ready = b""
        if len(ready) < REPLY.size:
            self.stop()
            raise RuntimeError(
                f"the verifier's worker server did not start (exit code {self.process.returncode}). Its own error "
                "stands above; check that sympy and latex2sympy2_extended are installed."
            )

    def fork(self) -> _Worker:
        """Returns a fresh child that has a connection of its own."""
        ours, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(self.control, [COMMAND.pack(FORK, 0)], [theirs.fileno()])
            reply = self.control.recv(REPLY.size)
        if len(reply) < REPLY.size:
            ours.close()
            raise ConnectionError("the verifier's worker server is gone")
        return _Worker(REPLY.unpack(reply)[0], Connection(ours.detach()))

    def kill(self, process: int) -> None:
        """Kills and reaps a child; only its parent can do so without a race on the process id."""
        self.control.sendall(COMMAND.pack(KILL, process))
        self.control.recv(REPLY.size)

    def stop(self) -> None:
        """Ends the server and its workers; does nothing in a fork of the owner, whose processes they are."""
        if self.owner != os.getpid():
            return
        for worker in self.workers:
            worker.connection.close()
        self.workers.clear()
        self.control.close()
        try:
            self.process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class WorkerPool:
    """Compares answers in processes that are started when first needed."""

    def __init__(self, num_workers: int, timeout_seconds: float, memory_limit_mb: int) -> None:
        self.num_workers = num_workers
        self.timeout_seconds = timeout_seconds
        self.memory_limit_mb = memory_limit_mb
        self.num_restarts = 0
        self._lock = threading.Lock()
        self._server: _Server | None = None
        self._finalizer: weakref.finalize | None = None

    def processes(self) -> list[int]:
        """Returns the process ids of the server and of its workers; none before the first comparison."""
        server = self._server
        return [] if server is None else [server.process.pid, *(worker.process for worker in server.workers)]

    def close(self) -> None:
        """Stops all processes. A later comparison starts new ones."""
        with self._lock:
            self._stop_server()

    def compare(self, jobs: Sequence[Job]) -> list[Timed]:
        """Returns an outcome for each job, in order. Threads take turns."""
        if not jobs:
            return []
        with self._lock:
            results: list[Timed | None] = [None] * len(jobs)
            workers = self._started(min(self.num_workers, len(jobs)))
            pending = list(range(len(jobs) - 1, -1, -1))
            while pending or any(worker.job >= 0 for worker in workers):
                for worker in workers:
                    if worker.job < 0 and pending:
                        self._send_job(worker, pending, jobs, results)
                self._collect(workers, results)
            return [result or Timed(unknown("lost"), 0.0) for result in results]

    def _start_server(self) -> _Server:
        server = self._server = _Server(self.memory_limit_mb)
        self._finalizer = weakref.finalize(self, server.stop)
        return server

    def _stop_server(self) -> None:
        if self._finalizer is not None:
            self._finalizer()
        self._server = self._finalizer = None

    def _started(self, count: int) -> list[_Worker]:
        server = self._server
        if server is None or server.owner != os.getpid() or server.process.poll() is not None:
            self._stop_server()
            server = self._start_server()
        while len(server.workers) < count:
            server.workers.append(server.fork())
        return server.workers

    def _send_job(self, worker: _Worker, pending: list[int], jobs: Sequence[Job], results: list[Timed | None]) -> None:
        job = pending.pop()
        worker.job, worker.started = job, time.monotonic()
        try:
            worker.connection.send_bytes(json.dumps(jobs[job]).encode())
        except OSError:
            results[job] = Timed(unknown("the worker process died"), 0.0)
            self._replace(worker)

    def _collect(self, workers: list[_Worker], results: list[Timed | None]) -> None:
        """Reads the replies that have arrived and kills the workers that are over their time."""
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
        """Puts a fresh process in the place of a dead or hanging one."""
        self.num_restarts += 1
        worker.connection.close()
        worker.job = -1
        server = self._server
        assert server is not None
        try:
            server.kill(worker.process)
            fresh = server.fork()
        except OSError:
            # The other workers died with their server; each is replaced when its connection turns out to be closed.
            workers, server.workers = server.workers, []
            self._stop_server()
            server = self._start_server()
            server.workers = workers
            fresh = server.fork()
        worker.process, worker.connection = fresh.process, fresh.connection
