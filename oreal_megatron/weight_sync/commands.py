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

from oreal_megatron.weight_sync.sglang_layout import LOADER, SGLangLayout, served_tensors
from oreal_megatron.weight_sync.source import PolicyShards
from oreal_megatron.weight_sync.types import PausedServer, TransferFailure
from oreal_megatron.weight_sync.worker import Audit, Command, Receive, Unpack, WorkerReport

NamedTensors = list[tuple[str, Tensor]]


@dataclass(frozen=True)
class EncodedCommand:
    """An order, ready to be handed to a worker."""

    key: str
    """Of its report."""
    payload: bytes


@dataclass(frozen=True)
class PendingCommand:
    """One order to each worker of a server."""

    answer: Future[None]
    keys: tuple[str, ...]


class CommandChannel:
    """Any rank writes orders; the main one hands them to servers and reads the reports."""

    def __init__(self, shards: PolicyShards, layout: SGLangLayout, *, timeout_seconds: float):
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

    def encode(
        self, task: Receive | Unpack | Audit, rank: int, pickled: Callable[[NamedTensors], bytes] = pickle.dumps
    ) -> EncodedCommand:
        """For the worker of tensor-parallel rank `rank`.

        pickled: of what SGLang hands to the loader; a rank that adds buffers pickles them its own way.
        """
        command = Command(
            host=self.host,
            port=self.port,
            timeout_seconds=self.timeout_seconds,
            report_key=f"reports/{uuid.uuid4().hex}",
            dtype=self.dtype,
            tensors=self._tensors[rank],
            task=task,
        )
        return EncodedCommand(command.report_key, pickled([("order", command.encoded())]))

    def send(self, server: PausedServer, commands: Sequence[EncodedCommand]) -> PendingCommand:
        """orders: one a tensor-parallel rank."""
        return PendingCommand(
            server.update_weights_from_tensor([command.payload for command in commands], LOADER),
            tuple(command.key for command in commands),
        )

    def reports(self, pending: PendingCommand) -> list[WorkerReport]:
        """Of every worker, when it has one.

        Raises:
            ConnectionError: the server is lost. ValueError: it refuses orders.
        """
        assert self.store is not None
        pending.answer.result()
        found = []
        for key in pending.keys:
            if not self.store.check([key]):  # a worker reports before its server answers
                found.append(WorkerReport(error="the worker left no report; see the server's log"))
                continue
            found.append(WorkerReport.decoded(self.store.get(key)))
            self.store.delete_key(key)
        return found

    def close(self) -> None:
        self.store = None


def failure_of(channel: CommandChannel, pending: PendingCommand) -> TransferFailure | None:
    """Why a server has not done what it was ordered to, when it has answered."""
    try:
        reports = channel.reports(pending)
    except (ConnectionError, ValueError) as error:
        return TransferFailure(str(error), is_lost=isinstance(error, ConnectionError))
    errors = [f"tensor-parallel rank {rank}: {report.error}" for rank, report in enumerate(reports) if report.error]
    return TransferFailure(errors[0]) if errors else None


def own_address() -> str:
    """The address of this machine that servers on others can reach."""
    return socket.gethostbyname(socket.gethostname())
