"""The ranks of a trainer as processes of one machine, forked from one that has imported everything already."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

FORK = multiprocessing.get_context("fork")


def start_ranks(world: int, function: Callable[..., None], *arguments: Any, processes: Any = FORK) -> list[BaseProcess]:
    """`function(rank, *arguments)` in `world` processes with the environment in which torch.distributed finds itself.

    processes: a multiprocessing context; CUDA cannot be used in a fork.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [processes.Process(target=_as_rank, args=(rank, world, port, function, arguments)) for rank in range(world)]
    for rank in ranks:
        rank.start()
    return ranks


def run_ranks(world: int, function: Callable[..., None], *arguments: Any, processes: Any = FORK) -> None:
    """As `start_ranks`, and waits for them. Raises RuntimeError where one failed; its traceback is on stderr."""
    ranks = start_ranks(world, function, *arguments, processes=processes)
    for rank in ranks:
        rank.join()
    if failed := {number: rank.exitcode for number, rank in enumerate(ranks) if rank.exitcode}:
        raise RuntimeError(f"exit codes by rank: {failed}")


def _as_rank(rank: int, world: int, port: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    where = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in where.items()}
    function(rank, *arguments)
