"""Which rank failed first: its error is the one to read, the others only lost contact with it.

A rank that fails says so in the job's store before it leaves the process groups. The others' collectives then
end with an error of the transport, and each says in one line whom it waited for. A rank that is killed says nothing;
its launcher does. torchrun ends the remaining ranks as soon as one has ended (SIGTERM, and SIGKILL 30 s later).
"""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist

from oreal_megatron.stopping import LostPeer

_KEY = "first_failure"
_SECONDS = 5.0
"""For the store to answer; also for the rank that failed first to say so."""


def lost_peer(error: Exception, store: dist.Store, rank: int) -> LostPeer | None:
    """None if this rank's `error` is the first of the job, else what to say instead of it."""
    transport = _is_of_transport(error)
    try:
        store.set_timeout(timedelta(seconds=_SECONDS))
        # A torn connection is the consequence of something else: such a rank waits for the cause to be named.
        first = int(store.get(_KEY) if transport else store.compare_set(_KEY, "", str(rank)))
    except (RuntimeError, ValueError):
        first = None
    if first == rank or (first is None and not transport):
        return None
    if first is not None:
        return LostPeer(f"rank {rank} stops: rank {first} failed, its error is above or in its log")
    said = str(error).strip().splitlines()[0]
    return LostPeer(f"rank {rank} stops: it lost contact with a rank that was killed or hangs ({said})")


def _is_of_transport(error: Exception) -> bool:
    """Whether the error comes from a collective: torch's own classes for NCCL and the store, gloo's by its text."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
