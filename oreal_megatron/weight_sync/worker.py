"""The server's side: a custom weight loader that every worker of a stock SGLang runs.

    python -m sglang.launch_server ... --custom-weight-loader oreal_megatron.weight_sync.worker.load

A POST of /update_weights_from_tensor with `load_format` of that name hands each worker an order, a few kilobytes. An
exception in here would end the server, so every outcome, good or bad, is reported in the store that the order names.
"""

from __future__ import annotations

import io
import json
import pickle
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from oreal_megatron.weight_sync.checksums import whole
from oreal_megatron.weight_sync.fp8_blocks import E4M3, quantise_into
from oreal_megatron.weight_sync.p2p import Receiver, Rendezvous, join, unpack
from oreal_megatron.weight_sync.planner import TransferOp
from oreal_megatron.weight_sync.sglang_layout import scales_of

_JOIN, _PART = b"join", b"part"
_OF_KV_CACHE = (".k_scale", ".v_scale")


class Task(Protocol):
    """What a worker shall do; one of those below."""

    def carry_out(
        self, held: WorkerParameters, buffers: Sequence[Tensor], store: dist.Store
    ) -> Mapping[str, int] | None:
        """held: by the worker. buffers: what came with the order. Returns what the report shall say."""


class WorkerParameters(Mapping[str, Tensor]):
    """A worker's parameters, to write what arrives into; of those in FP8, copies in the dtype that travels.

    Blocks are quantised when all of their weight is there. What waits for the rest of its weight is beside the
    parameters; in a direct publication that may be all of them.
    """

    def __init__(self, parameters: Mapping[str, Tensor], dtype: torch.dtype):
        """dtype: of what travels."""
        self.parameters = parameters
        self.dtype = dtype

    def __getitem__(self, name: str) -> Tensor:
        parameter = self.parameters[name]
        if parameter.dtype != E4M3:
            return parameter
        if name not in _waiting:
            _waiting[name] = torch.empty(parameter.shape, dtype=self.dtype, device=parameter.device)
        return _waiting[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.parameters)

    def __len__(self) -> int:
        return len(self.parameters)

    def blank(self) -> None:
        """A server that starts without weights holds random numbers, in the padding too, which nobody sends."""
        for parameter in self.parameters.values():
            parameter.zero_()
        _waiting.clear()
        _num_arrived.clear()

    def arrived(self, rectangles: Iterable[TransferOp]) -> None:
        """These have been written: quantises what is complete."""
        for item in rectangles:
            if item.target in _waiting:
                _num_arrived[item.target] += item.num_elements
        for name in [name for name, copy in _waiting.items() if _num_arrived[name] == copy.numel()]:
            quantise_into(self.parameters[name], self.parameters[scales_of(name)], _waiting.pop(name))
            del _num_arrived[name]


_waiting: dict[str, Tensor] = {}
"""Copies of FP8 weights that have not arrived as a whole: the buckets of a publication may be orders of their own."""
_num_arrived: Counter[str] = Counter()
"""Elements, by weight."""


@dataclass(frozen=True)
class Receive:
    """Its part of a direct publication, from the trainer's ranks."""

    rendezvous: Rendezvous
    number: int
    """The worker's, among all receivers."""
    bucket_bytes: int
    backend: str
    rectangles: Mapping[int, Sequence[TransferOp]] | None
    """By sender; None: as before in this meeting."""

    def carry_out(
        self, held: WorkerParameters, buffers: Sequence[Tensor], store: dist.Store
    ) -> Mapping[str, int] | None:
        try:
            receiver = self._receiver(held, store)
            receiver.receive(held)
        except Exception:
            _joined.clear()  # senders that wait for this worker hear at once that it is gone
            raise
        held.arrived(receiver.rectangles)
        return None

    def _receiver(self, held: WorkerParameters, store: dist.Store) -> Receiver:
        rendezvous = self.rendezvous
        if rendezvous.name not in _joined:
            if self.rectangles is None:
                raise ValueError(f"the worker has not joined meeting {rendezvous.name}, and the order has no plan")
            _joined.clear()
            store.set(arrival_key(rendezvous, self.number), "here")
            if store.get(start_key(rendezvous)) != _JOIN:
                raise ValueError(f"meeting {rendezvous.name} does not take place: another server did not come")
            _joined[rendezvous.name] = Receiver(
                join(rendezvous, rendezvous.num_senders + self.number, self.backend),
                self.number,
                rendezvous.num_receivers,
                self.rectangles,
                rendezvous.num_senders,
                dtype=held.dtype,
                bucket_bytes=self.bucket_bytes,
            )
            held.blank()
        return _joined[rendezvous.name]


_joined: dict[str, Receiver] = {}
"""The receiver of the present meeting, by the meeting's name."""


@dataclass(frozen=True)
class Unpack:
    """A bucket in memory that the worker shares with a trainer rank."""

    rectangles: Sequence[TransferOp]
    is_first: bool
    """Of a publication."""
    file: str | None
    """Where the bucket is mapped; None: it comes with the order."""

    def carry_out(
        self, held: WorkerParameters, buffers: Sequence[Tensor], store: dist.Store
    ) -> Mapping[str, int] | None:
        if self.is_first:
            held.blank()
        if self.rectangles:
            size = sum(item.num_elements for item in self.rectangles)
            bucket = buffers[0] if self.file is None else torch.from_file(self.file, True, size, dtype=held.dtype)
            unpack(self.rectangles, bucket, held)
            held.arrived(self.rectangles)
        return None


@dataclass(frozen=True)
class Audit:
    """Checksums of all that the worker holds."""

    def carry_out(
        self, held: WorkerParameters, buffers: Sequence[Tensor], store: dist.Store
    ) -> Mapping[str, int] | None:
        return {name: whole(parameter) for name, parameter in held.parameters.items()}


@dataclass(frozen=True)
class Command:
    """A task, and where its outcome is reported."""

    host: str
    port: int
    """Of the store."""
    timeout_seconds: float
    report_key: str
    dtype: str
    """Of what travels."""
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    """What the trainer takes the worker's for: dtype and shape."""
    task: Receive | Unpack | Audit

    def encoded(self) -> Tensor:
        """uint8 [n], as tensors are all that the endpoint carries."""
        return torch.frombuffer(bytearray(pickle.dumps(self)), dtype=torch.uint8)

    @classmethod
    def decoded(cls, tensor: Tensor) -> Command:
        command = _OwnClasses(io.BytesIO(tensor.cpu().numpy().tobytes())).load()
        assert isinstance(command, cls)
        return command


class _OwnClasses(pickle.Unpickler):
    """Whoever reaches the server's port may send anything: nothing but records of this package is built."""

    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name) if module.startswith("oreal_megatron.") else None
        if not isinstance(found, type) or not hasattr(found, "__dataclass_fields__"):
            raise pickle.UnpicklingError(f"{module}.{name} has no place in an order")
        return found


def arrival_key(rendezvous: Rendezvous, number: int) -> str:
    """Where receiver `number` says that it has come."""
    return f"{rendezvous.name}/arrived/{number}"


def start_key(rendezvous: Rendezvous) -> str:
    """Where receivers read whether all have come."""
    return f"{rendezvous.name}/start"


def start(store: dist.Store, rendezvous: Rendezvous, *, joining: bool) -> None:
    """Tells receivers that have arrived to join, or to give up."""
    store.set(start_key(rendezvous), (_JOIN if joining else _PART).decode())


@dataclass(frozen=True)
class WorkerReport:
    """What a worker says of an order."""

    error: str | None = None
    checksums: Mapping[str, int] | None = None
    seconds: float = 0.0

    def encoded(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def decoded(cls, text: bytes | str) -> WorkerReport:
        return cls(**json.loads(text))


def load(model: torch.nn.Module, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
    """SGLang's call. named_tensors: the encoded order, then buffers that belong to it."""
    start = time.perf_counter()
    try:
        (_, encoded), *buffers = named_tensors
        command = Command.decoded(encoded)
        store = dist.TCPStore(
            command.host, command.port, is_master=False, timeout=timedelta(seconds=command.timeout_seconds)
        )
    except Exception:
        traceback.print_exc()  # nobody to report to
        return
    try:
        held = WorkerParameters(_parameters(model), getattr(torch, command.dtype))
        _check_tensors(held.parameters, command.tensors)
        with torch.no_grad():
            checksums = command.task.carry_out(held, [buffer for _, buffer in buffers], store)
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # whoever reads the report may use a shared bucket anew
        report = WorkerReport(checksums=checksums, seconds=time.perf_counter() - start)
    except Exception:
        report = WorkerReport(error=traceback.format_exc())
    try:
        store.set(command.report_key, report.encoded())
    except RuntimeError:
        traceback.print_exc()


def _parameters(model: torch.nn.Module) -> dict[str, Tensor]:
    """Without the scales of an FP8 KV cache, which are SGLang's own and no part of the weights."""
    return {name: parameter for name, parameter in model.named_parameters() if not name.endswith(_OF_KV_CACHE)}


def _check_tensors(parameters: Mapping[str, Tensor], planned: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """Raises ValueError, with every difference, where the server's tensors are not those that the plan fills."""
    problems = [f"{name}: planned, and not in the server" for name in planned.keys() - parameters.keys()]
    problems += [f"{name}: in the server, and not planned" for name in parameters.keys() - planned.keys()]
    for name in planned.keys() & parameters.keys():
        dtype, shape = planned[name]
        found, kind = tuple(parameters[name].shape), str(parameters[name].dtype).removeprefix("torch.")
        if (kind, found) != (dtype, tuple(shape)):
            problems.append(f"{name}: {kind} {list(found)} in the server, planned {dtype} {list(shape)}")
    if problems:
        raise ValueError("the server holds other tensors than the plan fills:\n  " + "\n  ".join(sorted(problems)))
