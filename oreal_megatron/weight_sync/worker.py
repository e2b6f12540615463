"""The servers' side: a custom weight loader that every worker of an unmodified SGLang runs.

    python -m sglang.launch_server ... --custom-weight-loader oreal_megatron.weight_sync.worker.load

A POST of /update_weights_from_tensor with `load_format` of that name hands each worker a command of a few kilobytes. An
exception here would end the server, so every result, good or bad, is reported in the store that the command names.
"""

from __future__ import annotations

import io
import json
import logging
import pickle
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from oreal_megatron.weight_sync.checksums import ArrivingChecksums, Checksums, exactly_covered, whole
from oreal_megatron.weight_sync.fp8_blocks import E4M3, quantise_into
from oreal_megatron.weight_sync.p2p import Receiver, Rendezvous, join, nccl_version, unpack
from oreal_megatron.weight_sync.planner import TransferOp, num_elements
from oreal_megatron.weight_sync.sglang_layout import scales_of

logger = logging.getLogger(__name__)

_JOIN, _CANCEL = b"join", b"cancel"
_KV_CACHE_SCALES = (".k_scale", ".v_scale")


@dataclass(frozen=True)
class Receive:
    """Task to receive this worker's part of a direct publication from the trainer's ranks."""

    rendezvous: Rendezvous
    number: int
    """Number of the worker among all receivers."""
    bucket_bytes: int
    backend: str
    ops: Mapping[int, Sequence[TransferOp]] | None
    """Transfer ops by sender; None if the worker has joined this rendezvous already and the ops are the same."""
    only_changes: bool = False
    """Whether the trainer sends what differs from its last publication alone, which the worker received."""


@dataclass(frozen=True)
class Unpack:
    """Task to unpack a bucket out of memory that the worker shares with a trainer rank."""

    ops: Sequence[TransferOp]
    is_first: bool
    """Whether the bucket is the first of a publication."""
    file: str | None
    """File to map the bucket from; None if the bucket comes with the command."""


Question = Literal["checksums", "nccl"]
"""Task that changes nothing: report checksums of all parameters, or only what every report has: NCCL's version."""


@dataclass(frozen=True)
class Command:
    """A task for a worker, with the store that its result is reported in."""

    host: str
    """Host of the store."""
    port: int
    timeout_seconds: float
    report_key: str
    dtype: str
    """Dtype of the transfer."""
    parameters: Mapping[str, tuple[str, tuple[int, ...]]]
    """Parameters that the trainer expects the worker to have: name -> (dtype, shape)."""
    task: Receive | Unpack | Question

    def encoded(self) -> Tensor:
        """Returns the command as a tensor, uint8 [n], because the endpoint carries only tensors."""
        return torch.frombuffer(bytearray(pickle.dumps(self)), dtype=torch.uint8)

    @classmethod
    def decoded(cls, tensor: Tensor) -> Command:
        command = _RecordUnpickler(io.BytesIO(tensor.cpu().numpy().tobytes())).load()
        assert isinstance(command, cls)
        return command


class _RecordUnpickler(pickle.Unpickler):
    """Builds records of this package and nothing else, because any process may send data to the server's port."""

    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name) if module.startswith("oreal_megatron.") else None
        if not isinstance(found, type) or not hasattr(found, "__dataclass_fields__"):
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a command")
        return found


@dataclass(frozen=True)
class WorkerReport:
    """The result of a command."""

    error: str | None = None
    checksums: Mapping[str, int] | None = None
    """Checksums of all parameters, after weights were received or if they were asked for."""
    seconds: float = 0.0
    nccl: str | None = None
    """Version of NCCL in the worker's environment; None if its torch is built without NCCL."""

    def encoded(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def decoded(cls, text: bytes | str) -> WorkerReport:
        return cls(**json.loads(text))


class Worker:
    """Executes commands, and keeps what must outlive one of them.

    A publication's buckets may be commands of their own, so FP8 weights that have arrived in part are kept in the dtype
    of the transfer, in addition to the parameters, until all of their elements are there and they can be quantised.
    """

    def __init__(self) -> None:
        self._incomplete: dict[str, Tensor] = {}
        """FP8 weights that have arrived in part, in the dtype of the transfer."""
        self._num_arrived: Counter[str] = Counter()
        """Number of elements that have arrived of each incomplete weight."""
        self._receiver: Receiver | None = None
        """Receiver of the rendezvous that the worker joined last."""
        self._covered: frozenset[str] = frozenset()
        """Parameters whose elements the receiver writes exactly once each."""

    def execute(
        self, command: Command, parameters: Mapping[str, Tensor], buffers: Sequence[Tensor], store: dist.Store
    ) -> Mapping[str, int] | None:
        """Executes a command on a model's parameters; returns checksums of all of them if it receives or audits.

        buffers: tensors that came with the command.
        """
        dtype = getattr(torch, command.dtype)
        match command.task:
            case Receive() as task:
                return self._receive(task, parameters, dtype, store)
            case Unpack() as task:
                self._unpack(task, parameters, dtype, buffers)
            case "checksums":
                return {name: whole(parameter) for name, parameter in parameters.items()}
        return None

    def _receive(
        self, task: Receive, parameters: Mapping[str, Tensor], dtype: torch.dtype, store: dist.Store
    ) -> Checksums:
        """Receives all weights; returns the checksums of the parameters as they are after the last write."""
        try:
            receiver = self._joined(task, parameters, dtype, store)
            sums = ArrivingChecksums(parameters, self._covered)

            def arrived(ops: Sequence[TransferOp]) -> None:
                for op in ops:
                    if op.target not in self._incomplete:
                        sums.add_part(op.target, op.target_box)
                for name in self._quantise_complete(ops, parameters):
                    sums.add_whole(name)
                    sums.add_whole(scales_of(name))

            destinations = self._destinations(receiver.ops, parameters, dtype)
            receiver.receive(destinations, arrived, only_changes=task.only_changes)
        except Exception:
            self._leave()
            raise
        return sums.result()

    def _joined(
        self, task: Receive, parameters: Mapping[str, Tensor], dtype: torch.dtype, store: dist.Store
    ) -> Receiver:
        """Returns the receiver of the task's rendezvous, which the worker joins first if it has not yet."""
        rendezvous = task.rendezvous
        if self._receiver is not None and self._receiver.rendezvous == rendezvous:
            return self._receiver
        if task.ops is None:
            raise ValueError(f"the worker has not joined rendezvous {rendezvous.name}, and the command has no ops")
        self._leave()
        store.set(arrival_key(rendezvous, task.number), "arrived")
        if store.get(_start_key(rendezvous)) != _JOIN:
            raise ValueError(f"rendezvous {rendezvous.name} is cancelled: another server did not arrive")
        self._receiver = Receiver(
            join(rendezvous, rendezvous.num_senders + task.number, task.backend),
            rendezvous,
            task.number,
            task.ops,
            dtype=dtype,
            bucket_bytes=task.bucket_bytes,
        )
        of_parameters = ((op.target, op.target_box) for op in self._receiver.ops)
        self._covered = exactly_covered(of_parameters, parameters)
        self._clear(parameters)
        return self._receiver

    def _leave(self) -> None:
        """Closes the connections of the rendezvous, so that senders that wait for this receiver fail at once."""
        if self._receiver is not None:
            self._receiver.close()
        self._receiver = None

    def _unpack(
        self, task: Unpack, parameters: Mapping[str, Tensor], dtype: torch.dtype, buffers: Sequence[Tensor]
    ) -> None:
        if task.is_first:
            self._clear(parameters)
        if task.ops:
            size = num_elements(task.ops)
            bucket = buffers[0] if task.file is None else torch.from_file(task.file, True, size, dtype=dtype)
            unpack(task.ops, bucket, self._destinations(task.ops, parameters, dtype))
            self._quantise_complete(task.ops, parameters)

    def _destinations(
        self, ops: Iterable[TransferOp], parameters: Mapping[str, Tensor], dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """Returns the tensors that ops write to: parameters, or for FP8 weights copies in the dtype of the transfer.

        Allocates the copies that are not there yet.
        """
        destinations = {op.target: parameters[op.target] for op in ops}
        for name, parameter in destinations.items():
            if parameter.dtype == E4M3:
                if name not in self._incomplete:
                    self._incomplete[name] = torch.empty(parameter.shape, dtype=dtype, device=parameter.device)
                destinations[name] = self._incomplete[name]
        return destinations

    def _quantise_complete(self, ops: Iterable[TransferOp], parameters: Mapping[str, Tensor]) -> list[str]:
        """Counts the elements of ops that were written, and quantises the FP8 weights that are complete.

        Returns the names of the quantised weights.
        """
        for op in ops:
            if op.target in self._incomplete:
                self._num_arrived[op.target] += op.num_elements
        complete = [name for name, copy in self._incomplete.items() if self._num_arrived[name] == copy.numel()]
        for name in complete:
            quantise_into(parameters[name], parameters[scales_of(name)], self._incomplete.pop(name))
            del self._num_arrived[name]
        return complete

    def _clear(self, parameters: Mapping[str, Tensor]) -> None:
        """Sets parameters to zero: a server that starts without weights has random numbers, in the padding too."""
        for parameter in parameters.values():
            parameter.zero_()
        self._incomplete.clear()
        self._num_arrived.clear()


_WORKER = Worker()
"""State of this process between commands: SGLang calls `load` for each of them and keeps nothing for it."""


def load(model: torch.nn.Module, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Executes a command; SGLang calls this function.

    named_tensors: the encoded command, then the buffers that belong to it.
    """
    start = time.perf_counter()
    try:
        (_, encoded), *buffers = named_tensors
        command = Command.decoded(encoded)
        store = dist.TCPStore(
            command.host, command.port, is_master=False, timeout=timedelta(seconds=command.timeout_seconds)
        )
    except Exception:
        logger.exception("A command could not be decoded, or its store could not be reached.")
        return
    try:
        parameters = _parameters(model)
        _check_parameters(parameters, command.parameters)
        with torch.no_grad():
            checksums = _WORKER.execute(command, parameters, [buffer for _, buffer in buffers], store)
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the trainer reuses a shared bucket as soon as it reads the report
        report = WorkerReport(checksums=checksums, seconds=time.perf_counter() - start, nccl=nccl_version())
    except Exception:
        report = WorkerReport(error=traceback.format_exc())
    try:
        store.set(command.report_key, report.encoded())
    except RuntimeError:
        logger.exception("The result of a command could not be reported to %s:%d.", command.host, command.port)


def arrival_key(rendezvous: Rendezvous, number: int) -> str:
    """Returns the store's key under which receiver `number` reports that it has arrived."""
    return f"{rendezvous.name}/arrived/{number}"


def _start_key(rendezvous: Rendezvous) -> str:
    return f"{rendezvous.name}/start"


def answer_arrivals(store: dist.Store, rendezvous: Rendezvous, *, joining: bool) -> None:
    """Has all receivers that have arrived join the group, or cancels the rendezvous."""
    store.set(_start_key(rendezvous), (_JOIN if joining else _CANCEL).decode())


def _parameters(model: torch.nn.Module) -> dict[str, Tensor]:
    """Returns a model's weights by name, without the scales of an FP8 KV cache, which SGLang computes itself."""
    return {name: parameter for name, parameter in model.named_parameters() if not name.endswith(_KV_CACHE_SCALES)}


def _check_parameters(parameters: Mapping[str, Tensor], expected: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """Raises ValueError, with every difference, if the server's parameters are not those that the plan fills."""
    problems = [f"{name}: planned, and not in the server" for name in expected.keys() - parameters.keys()]
    problems += [f"{name}: in the server, and not planned" for name in parameters.keys() - expected.keys()]
    for name in expected.keys() & parameters.keys():
        dtype, shape = expected[name]
        found, kind = tuple(parameters[name].shape), str(parameters[name].dtype).removeprefix("torch.")
        if (kind, found) != (dtype, tuple(shape)):
            problems.append(f"{name}: {kind} {list(found)} in the server, planned {dtype} {list(shape)}")
    if problems:
        raise ValueError("the server's parameters are not those of the plan:\n  " + "\n  ".join(sorted(problems)))
