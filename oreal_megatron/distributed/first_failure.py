"""Finds the rank that failed first: its error is the cause, the other ranks only lost contact with it.

A rank that fails writes its number to the job's store before it leaves the process groups. The collectives of the
other ranks then fail with an error of the transport, and each of these ranks reports the number in one line. A rank
that is killed writes nothing; its launcher reports it. torchrun ends the remaining ranks as soon as one has ended
(SIGTERM, and SIGKILL 30 s later).
"""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist

from oreal_megatron.stopping import LostPeer

_KEY = "first_failure"
_SECONDS = 5.0
"""Time limit for an answer of the store, and for the rank that failed first to write its number."""


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
        return LostPeer(f"rank {rank} stops: rank {first} failed, its error is above or in its log")
    first_line = str(error).strip().splitlines()[0]
    return LostPeer(f"rank {rank} stops: it lost contact with a rank that was killed or hangs ({first_line})")


def _is_transport_error(error: Exception) -> bool:
    """Whether a collective raised the error: a DistError of NCCL or the store, or a RuntimeError that names gloo."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
