"""The processes that compare symbolic answers: a small forking server, and its killable children.

`python -m oreal_megatron.verifier.workers.worker FD MEMORY_MB` imports sympy once, in an interpreter without threads,
devices or other state of the trainer, and forks a child in milliseconds whenever the pool asks. The pool kills a child
that runs out of time, and the next child starts with sympy loaded.

Lifetime: the server ends when its control socket closes or its parent has died, and it kills its children first; a
child also dies with the server (PR_SET_PDEATHSIG). So no process survives a kill -9 of the trainer.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import resource
import signal
import socket
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection

from oreal_megatron.verifier.outcome import Outcome, unknown
from oreal_megatron.verifier.workers.pool import COMMAND, FORK, REPLY

_PARENT_CHECK_SECONDS = 1.0
_PR_SET_PDEATHSIG = 1
_MAX_OPEN_FILES = 64

# The parser builds its tables as it meets constructs; children inherit the tables that the server has built.
_WARM_UP = (
    (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}"), (r"x^{2}+2x+1", r"(x+1)^{2}"), (r"\log_{2} 8-\ln 3", r"3-\ln 3"),
    (r"[1,\sqrt{2}]", r"1\le x\le\sqrt{2}"), ("y=2x+1", "2x-y+1=0"), ("f(x)=x^{2}+1", "f(t)=t^{2}+1"),
    ("u(t)e^{-2t}", "2u(t)"),
    (r"\begin{pmatrix}\sqrt{2}\\1\end{pmatrix}", r"(\sqrt{2},2)"), (r"\int_{0}^{1} x^{2} dx", r"\frac{1}{3}"),
    (r"\int x^{3} dx", "x"),
    (r"\sum_{k=1}^{n} k^{2}", r"\sum_{k=0}^{\infty} \frac{x^{k}}{k!}"), (r"\prod_{k=1}^{3} (k+1)", "24"),
    (r"\gcd(12,18)", r"\max(1,2)"),
    (r"2^10\cdot 3^5", r"2^6 3^5"), (r"\sin(x)^{2}", r"\cos x/2"), ("9 3", r"25 \sqrt{3}2"),
    (r"\lim_{x\to 0} x", r"\frac{d}{dx} x^{2}"),
)  # fmt: skip


def _die_with_parent(parent: int) -> None:
    """Asks Linux to kill this process when the server ends; on other systems only the server kills its children."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)


def _limit_resources(memory_limit_mb: int) -> None:
    """Limits memory and open files, and forbids writing files and leaving core dumps."""
    memory = memory_limit_mb * 2**20
    for kind, limit in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, _MAX_OPEN_FILES),
    ):
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(kind, (limit, limit))


def _compare(gold: str, answers: Sequence[str], earlier: Sequence[str]) -> Outcome:
    """Returns the outcome of a job. A failure of the comparison is UNDECIDED: it says nothing about the answer."""
    from oreal_megatron.verifier.equality.expressions import SymbolicLeaves
    from oreal_megatron.verifier.rules import compare_final

    try:
        return compare_final(gold, answers, earlier, SymbolicLeaves())
    except RecursionError:
        return unknown("the comparison recursed too deeply")
    except MemoryError:
        raise
    except Exception as error:
        return unknown(f"the comparison failed: {type(error).__name__}: {error}"[:200])


def _serve(connection: Connection) -> None:
    """Compares the jobs that the pool sends until it closes the connection."""
    while True:
        try:
            gold, answers, earlier = json.loads(connection.recv_bytes())
        except (EOFError, OSError):
            return
        try:
            outcome = _compare(gold, answers, earlier)
        except MemoryError:
            # The heap may be fragmented: report it and end, so that the pool forks a fresh process.
            connection.send_bytes(json.dumps(unknown("the comparison ran out of memory")).encode())
            return
        connection.send_bytes(json.dumps(outcome).encode())


def _fork(control: socket.socket, descriptor: int, memory_limit_mb: int) -> int:
    server = os.getpid()
    child = os.fork()
    if child:
        os.close(descriptor)
        return child
    try:
        _die_with_parent(server)
        control.close()
        _limit_resources(memory_limit_mb)
        _serve(Connection(descriptor))
    finally:
        os._exit(0)


def _reap(child: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(child, 0)


def run_server(control: socket.socket, memory_limit_mb: int) -> None:
    """Forks and kills children as the pool commands, until the pool has ended."""
    parent = os.getppid()
    children: set[int] = set()
    control.settimeout(_PARENT_CHECK_SECONDS)
    try:
        while True:
            try:
                message, descriptors, _, _ = socket.recv_fds(control, COMMAND.size, 1)
            except TimeoutError:
                if os.getppid() != parent:
                    return
                continue
            if len(message) < COMMAND.size:
                return
            command, process = COMMAND.unpack(message)
            if command == FORK:
                process = _fork(control, descriptors[0], memory_limit_mb)
                children.add(process)
            elif process in children:
                _reap(process)
                children.discard(process)
            control.sendall(REPLY.pack(process))
    except OSError:
        return  # the pool has closed its end
    finally:
        for child in children:
            _reap(child)


def main() -> None:
    """Warms up, reports that the server is ready, and serves until the pool has ended."""
    control = socket.socket(fileno=int(sys.argv[1]))
    for gold, answer in _WARM_UP:
        _compare(gold, (answer,), ())
    gc.freeze()
    control.sendall(REPLY.pack(os.getpid()))
    run_server(control, int(sys.argv[2]))


if __name__ == "__main__":
    main()
