"""Commands to the workers of paused servers, and their reports: the trainer's side of worker.py."""

from __future__ import annotations

import io
import pickle
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

from oreal_megatron.distributed.addresses import address_towards
from oreal_megatron.weight_sync.p2p import nccl_version
from oreal_megatron.weight_sync.planner import ReshardingPlan
from oreal_megatron.weight_sync.sglang_layout import LOADER
from oreal_megatron.weight_sync.source import PolicyShards
from oreal_megatron.weight_sync.types import PausedServer, TransferFailure
from oreal_megatron.weight_sync.worker import Command, Question, Receive, Unpack, WorkerReport

EncodedCommand = tuple[str, bytes]
"""The key of a command's report, and the command as bytes that a server takes. Any trainer rank makes it, the main rank
sends it."""


class CommandChannel:
    """Sends commands to the workers of servers and reads their reports.

    Every rank can encode commands; the main rank sends them.
    """

    def __init__(
        self, shards: PolicyShards, plan: ReshardingPlan, *, timeout_seconds: float, peers: Sequence[str] = ()
    ):
        """Opens the store on the main rank. Every rank calls it.

        timeout_seconds: time that a worker waits for other processes. peers: hosts that reach the
        store, of which the first on another machine decides by which address (`address_towards`).
        """
        self.timeout_seconds = timeout_seconds
        self._groups = shards.groups
        self.tensor = plan.tensor
        self.dtype = str(shards.dtype).removeprefix("torch.")
        self._parameters: list[Mapping[str, tuple[str, tuple[int, ...]]]] = [
            {name: kind for tensor in tensors for name, kind in tensor.parameters(self.dtype).items()}
            for tensors in plan.targets
        ]
        self._report_keys: dict[Future[None], tuple[str, ...]] = {}
        """Keys of the reports to commands that were sent, by the server's answer."""
        self.store: dist.TCPStore | None = None
        if shards.groups.is_main:
            self.store = dist.TCPStore(
                "0.0.0.0", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_seconds)
            )
        address = (address_towards(peers), self.store.port) if self.store is not None else None
        self.host, self.port = shards.groups.from_main(address)

    def encode(self, task: Receive | Unpack | Question, rank: int, *, bucket: Tensor | None = None) -> EncodedCommand:
        """Encodes a task for the worker of tensor-parallel rank `rank`. bucket: GPU tensor that goes with it."""
        command = Command(
            host=self.host,
            port=self.port,
            timeout_seconds=self.timeout_seconds,
            report_key=f"reports/{uuid.uuid4().hex}",
            dtype=self.dtype,
            parameters=self._parameters[rank],
            task=task,
        )
        tensors = [("command", command.encoded())] + ([] if bucket is None else [("bucket", bucket)])
        return command.report_key, pickled(tensors)

    def send(self, server: PausedServer, commands: Sequence[EncodedCommand]) -> Future[None]:
        """Sends a server one command a tensor-parallel rank; returns the server's answer, for `reports`."""
        answer = server.update_weights_from_tensor([payload for _, payload in commands], LOADER)
        self._report_keys[answer] = tuple(report_key for report_key, _ in commands)
        return answer

    def reports(self, answer: Future[None]) -> list[WorkerReport]:
        """Waits for a server's answer and returns the report of every worker.

        Raises:
            ConnectionError: the server is lost.
            ValueError: the server refuses commands.
        """
        assert self.store is not None
        keys = self._report_keys.pop(answer)
        answer.result()
        found = []
        for key in keys:
            if not self.store.check([key]):  # a worker reports before its server answers
                found.append(WorkerReport(error="the worker left no report; see the server's log"))
                continue
            found.append(WorkerReport.decoded(self.store.get(key)))
            self.store.delete_key(key)
        return found

    def failure(self, answer: Future[None]) -> TransferFailure | None:
        """Waits for a server's answer and returns the reason why a command failed, or None."""
        return self.answered(answer)[1]

    def answered(self, answer: Future[None]) -> tuple[list[WorkerReport], TransferFailure | None]:
        """Waits for a server's answer; returns every worker's report, and the reason why a command failed, or None."""
        try:
            reports = self.reports(answer)
        except (ConnectionError, ValueError) as error:
            return [], TransferFailure(str(error), is_lost=isinstance(error, ConnectionError))
        errors = [f"tensor-parallel rank {rank}: {report.error}" for rank, report in enumerate(reports) if report.error]
        return reports, TransferFailure(errors[0]) if errors else None

    def nccl_mismatches(self, servers: Sequence[PausedServer]) -> dict[str, TransferFailure]:
        """Returns failures of the servers whose NCCL is another version than the trainer's, by name, on every rank.

        servers: read on the main rank only.
        """
        ours = nccl_version()
        failures: dict[str, TransferFailure] = {}
        if self._groups.is_main:
            ranks = range(self.tensor)
            answers = {
                server.name: self.send(server, [self.encode("nccl", rank) for rank in ranks]) for server in servers
            }
            for name, answer in answers.items():
                reports, failure = self.answered(answer)
                if failure is not None:
                    failures[name] = failure
                elif others := {report.nccl for report in reports} - {ours}:
                    failures[name] = TransferFailure(
                        f"its NCCL is {' and '.join(map(str, others))}, the trainer's is {ours}, and NCCL connects "
                        "equal versions only; install the same torch in both environments, as in requirements/*.lock, "
                        "or set rollout.sglang.transport=ipc or disk"
                    )
        return self._groups.from_main(failures)

    def close(self) -> None:
        self.store = None


def pickled(tensors: Sequence[tuple[str, Tensor]]) -> bytes:
    """Pickles named tensors for SGLang: GPU tensors as CUDA's handles, CPU tensors, uint8 [n], by value."""
    stream = io.BytesIO()
    _TensorPickler(stream).dump(tensors)
    return stream.getvalue()


class _TensorPickler(pickle.Pickler):
    """Pickles tensors with functions that SGLang's unpickler accepts.

    Tensors' own pickles name torch's function for storage on the CPU, in whose place megatron-core 0.19 puts another,
    which SGLang refuses. torch.multiprocessing's pickler starts a process for them.
    """

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return NotImplemented
        return reduce_tensor(value) if value.is_cuda else (torch.ByteTensor, (bytearray(value.numpy()),))
