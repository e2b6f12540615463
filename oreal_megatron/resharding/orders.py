"""Orders to the workers of paused servers, and their reports: the trainer's side of loader.py."""

from __future__ import annotations

import pickle
import socket
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch import Tensor

from oreal_megatron.resharding.delivery import Failure, PausedServer
from oreal_megatron.resharding.loader import Audit, Order, Receive, Unpack, WorkerReport
from oreal_megatron.resharding.served import LOADER, EngineLayout, served_tensors
from oreal_megatron.resharding.shards import PolicyShards

NamedTensors = list[tuple[str, Tensor]]


@dataclass(frozen=True)
class Written:
    """An order, ready to be handed to a worker."""

    key: str
    """Of its report."""
    payload: bytes


@dataclass(frozen=True)
class Given:
    """One order to each worker of a server."""

    answer: Future[None]
    keys: tuple[str, ...]


class Desk:
    """Any rank writes orders; the main one hands them to servers and reads the reports."""

    def __init__(self, shards: PolicyShards, layout: EngineLayout, *, timeout_seconds: float):
        """layout: of each server, whatever its count. timeout_seconds: that a worker waits for others."""
        self.timeout_seconds = timeout_seconds
        self.tensor = layout.tensor
        self.dtype = str(shards.dtype).removeprefix("torch.")
        self._tensors: list[Mapping[str, tuple[str, tuple[int, ...]]]] = [
            {
                name: kind
                for tensor in served_tensors(shards.table, shards.geometry, layout, rank)
                for name, kind in tensor.held(self.dtype).items()
            }
            for rank in range(layout.tensor)
        ]
        self.store: dist.TCPStore | None = None
        if shards.groups.is_main:
            self.store = dist.TCPStore(
                "0.0.0.0", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_seconds)
            )
        address = (own_address(), self.store.port) if self.store is not None else None
        self.host, self.port = shards.groups.from_main(address)

    def write(
        self, task: Receive | Unpack | Audit, rank: int, pickled: Callable[[NamedTensors], bytes] = pickle.dumps
    ) -> Written:
        """For the worker of tensor-parallel rank `rank`.

        pickled: of what SGLang hands to the loader; a rank that adds buffers pickles them its own way.
        """
        order = Order(
            host=self.host,
            port=self.port,
            timeout_seconds=self.timeout_seconds,
            report_key=f"reports/{uuid.uuid4().hex}",
            dtype=self.dtype,
            tensors=self._tensors[rank],
            task=task,
        )
        return Written(order.report_key, pickled([("order", order.encoded())]))

    def give(self, server: PausedServer, orders: Sequence[Written]) -> Given:
        """orders: one a tensor-parallel rank."""
        return Given(
            server.load_tensors([order.payload for order in orders], LOADER), tuple(order.key for order in orders)
        )

    def reports(self, given: Given) -> list[WorkerReport]:
        """Of every worker, when it has one.

        Raises:
            ConnectionError: the server is lost. ValueError: it refuses orders.
        """
        assert self.store is not None
        given.answer.result()
        found = []
        for key in given.keys:
            if not self.store.check([key]):  # a worker reports before its server answers
                found.append(WorkerReport(error="the worker left no report; see the server's log"))
                continue
            found.append(WorkerReport.decoded(self.store.get(key)))
            self.store.delete_key(key)
        return found

    def close(self) -> None:
        self.store = None


def failure_of(desk: Desk, given: Given) -> Failure | None:
    """Why a server has not done what it was ordered to, when it has answered."""
    try:
        reports = desk.reports(given)
    except (ConnectionError, ValueError) as error:
        return Failure(str(error), is_lost=isinstance(error, ConnectionError))
    errors = [f"tensor-parallel rank {rank}: {report.error}" for rank, report in enumerate(reports) if report.error]
    return Failure(errors[0]) if errors else None


def own_address() -> str:
    """The address of this machine that servers on others can reach."""
    return socket.gethostbyname(socket.gethostname())
