"""Finds the rank that failed first: its error is the cause, the other ranks only lost contact with it.

A rank that fails writes its number to the job's store before it leaves the process groups. The collectives of the
other ranks then fail with an error of the transport, and each of these ranks reports the number in one line. A rank
that is killed writes nothing; its launcher reports it. torchrun ends the remaining ranks as soon as one has ended
(SIGTERM, and SIGKILL 30 s later).

While the groups are created, gloo tries to reach a rank that has ended for five times its timeout, and cannot be
interrupted: a thread then ends the process.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist

from oreal_megatron.distributed.addresses import GLOO_INTERFACE
from oreal_megatron.stopping import LostPeer

_KEY = "first_failure"
_POLL_SECONDS = 1.0
_SECONDS = 5.0
"""Time limit for an answer of the store, and for the rank that failed first to write its number."""


@contextlib.contextmanager
def joining_together(store: dist.Store, rank: int, *, timeout_seconds: float) -> Iterator[None]:
    """Creates process groups within a time limit; ends this process if another rank fails to create them.

    Raises:
        ConnectionError: this rank cannot connect to another.
    """
    is_over = threading.Event()
    watch = threading.Thread(target=_end_with_others, args=(store, rank, timeout_seconds, is_over), daemon=True)
    watch.start()
    try:
        yield
    except RuntimeError as error:
        if not _is_transport_error(error):
            raise
        raise ConnectionError(f"{_cannot_connect(rank)} ({first_line(error)})") from error
    finally:
        is_over.set()
        watch.join()


def _end_with_others(store: dist.Store, rank: int, timeout_seconds: float, is_over: threading.Event) -> None:
    """Ends the process, with a message, once another rank has failed or the time is over, unless `is_over` is set."""
    deadline = time.monotonic() + timeout_seconds
    while not is_over.wait(_POLL_SECONDS):
        try:
            check_others(store, rank)
        except LostPeer as lost:
            _exit(str(lost))
        except RuntimeError:
            if is_over.is_set():
                return
            _exit(f"rank {rank} stops: it lost contact with the process that has the job's store")
        if time.monotonic() > deadline:
            _exit(f"{_cannot_connect(rank)} (parallel.timeout_seconds = {timeout_seconds:g} are over)")


def check_others(store: dist.Store, rank: int) -> None:
    """Looks for a failure of another rank, which a rank that waits outside of collectives does not notice.

    Raises:
        LostPeer: another rank has failed.
        DistError: the process that has the store has ended.
    """
    if store.check([_KEY]) and (first := int(store.get(_KEY))) != rank:
        raise LostPeer(_another_failed(rank, first))


def _exit(message: str) -> NoReturn:
    print(message, file=sys.stderr, flush=True)
    os._exit(1)  # the main thread is inside a call that does not return


def _cannot_connect(rank: int) -> str:
    interface = os.environ.get(GLOO_INTERFACE)
    used = f"the one of the host's name, {socket.gethostname()}" if interface is None else interface
    return (
        f"rank {rank} cannot connect to the other ranks; gloo's network interface is {used}: set {GLOO_INTERFACE}, or "
        "cluster.interface in a job, to the interface that connects the hosts"
    )


def _another_failed(rank: int, first: int) -> str:
    return f"rank {rank} stops: rank {first} failed, its error is above or in its log"


def lost_peer(error: Exception, store: dist.Store, rank: int) -> LostPeer | None:
    """Returns None if this rank's `error` is the first of the job, and otherwise the error to raise in its place."""
    is_transport = _is_transport_error(error)
    try:
        store.set_timeout(timedelta(seconds=_SECONDS))
        # A broken connection is a consequence: this rank waits for the number of the rank that caused it.
        first = int(store.get(_KEY) if is_transport else store.compare_set(_KEY, "", str(rank)))
    except (RuntimeError, ValueError):
        first = None
    if first == rank or (first is None and not is_transport):
        return None
    if first is not None:
        # This rank may have been told the cause (`ParallelGroups.together`).
        return LostPeer(_another_failed(rank, first) + ("" if is_transport else f": {first_line(error)}"))
    return LostPeer(f"rank {rank} stops: it lost contact with a rank that was killed or hangs ({first_line(error)})")


def first_line(error: Exception) -> str:
    """Returns the first line of an error's message: torch appends its stack."""
    return str(error).strip().splitlines()[0]


def _is_transport_error(error: Exception) -> bool:
    """Whether a collective raised the error: a DistError of NCCL or the store, or a RuntimeError that names gloo."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
