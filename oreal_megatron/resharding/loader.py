"""The server's side: a custom weight loader that every worker of a stock SGLang runs.

    python -m sglang.launch_server ... --custom-weight-loader oreal_megatron.resharding.loader.load

A POST of /update_weights_from_tensor with `load_format` of that name hands each worker an order, a few kilobytes. An
exception in here would end the server, so every outcome, good or bad, is reported in the store that the order names.
"""

from __future__ import annotations

import io
import json
import pickle
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from oreal_megatron.resharding.checksums import whole
from oreal_megatron.resharding.plan import Rectangle
from oreal_megatron.resharding.transport import Meeting, Receiver, join, unpack

_JOIN, _PART = b"join", b"part"


class Task(Protocol):
    """What a worker shall do; one of those below."""

    def carry_out(
        self, parameters: Mapping[str, Tensor], buffers: Sequence[Tensor], store: dist.Store
    ) -> Mapping[str, int] | None:
        """parameters: the worker's. buffers: what came with the order. Returns what the report shall say."""


@dataclass(frozen=True)
class Receive:
    """Its part of a direct publication, from the trainer's ranks."""

    meeting: Meeting
    number: int
    """The worker's, among all receivers."""
    dtype: str
    bucket_bytes: int
    backend: str
    rectangles: Mapping[int, Sequence[Rectangle]] | None
    """By sender; None: as before in this meeting."""

    def carry_out(
        self, parameters: Mapping[str, Tensor], buffers: Sequence[Tensor], store: dist.Store
    ) -> Mapping[str, int] | None:
        try:
            self._receiver(parameters, store).receive(parameters)
        except Exception:
            _joined.clear()  # senders that wait for this worker hear at once that it is gone
            raise
        return None

    def _receiver(self, parameters: Mapping[str, Tensor], store: dist.Store) -> Receiver:
        meeting = self.meeting
        if meeting.name not in _joined:
            if self.rectangles is None:
                raise ValueError(f"the worker has not joined meeting {meeting.name}, and the order has no plan")
            _joined.clear()
            store.set(arrival_key(meeting, self.number), "here")
            if store.get(start_key(meeting)) != _JOIN:
                raise ValueError(f"meeting {meeting.name} does not take place: another server did not come")
            _joined[meeting.name] = Receiver(
                join(meeting, meeting.num_senders + self.number, self.backend),
                self.number,
                meeting.num_receivers,
                self.rectangles,
                meeting.num_senders,
                dtype=getattr(torch, self.dtype),
                bucket_bytes=self.bucket_bytes,
            )
            _blank(parameters)
        return _joined[meeting.name]


_joined: dict[str, Receiver] = {}
"""The receiver of the present meeting, by the meeting's name."""


@dataclass(frozen=True)
class Unpack:
    """A bucket in memory that the worker shares with a trainer rank."""

    rectangles: Sequence[Rectangle]
    is_first: bool
    """Of a publication."""
    file: str | None
    """Where the bucket is mapped; None: it comes with the order."""

    def carry_out(
        self, parameters: Mapping[str, Tensor], buffers: Sequence[Tensor], store: dist.Store
    ) -> Mapping[str, int] | None:
        if self.is_first:
            _blank(parameters)
        if self.rectangles:
            size, dtype = sum(item.num_elements for item in self.rectangles), next(iter(parameters.values())).dtype
            bucket = buffers[0] if self.file is None else torch.from_file(self.file, True, size, dtype=dtype)
            unpack(self.rectangles, bucket, parameters)
        return None


@dataclass(frozen=True)
class Audit:
    """Checksums of all that the worker holds."""

    def carry_out(
        self, parameters: Mapping[str, Tensor], buffers: Sequence[Tensor], store: dist.Store
    ) -> Mapping[str, int] | None:
        return {name: whole(parameter) for name, parameter in parameters.items()}


@dataclass(frozen=True)
class Order:
    """A task, and where its outcome is reported."""

    host: str
    port: int
    """Of the store."""
    timeout_seconds: float
    report_key: str
    dtype: str
    shapes: Mapping[str, tuple[int, ...]]
    """What the trainer takes the worker's tensors for."""
    task: Receive | Unpack | Audit

    def encoded(self) -> Tensor:
        """uint8 [n], as tensors are all that the endpoint carries."""
        return torch.frombuffer(bytearray(pickle.dumps(self)), dtype=torch.uint8)

    @classmethod
    def decoded(cls, tensor: Tensor) -> Order:
        order = _OwnClasses(io.BytesIO(tensor.cpu().numpy().tobytes())).load()
        assert isinstance(order, cls)
        return order


class _OwnClasses(pickle.Unpickler):
    """Whoever reaches the server's port may send anything: nothing but records of this package is built."""

    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name) if module.startswith("oreal_megatron.") else None
        if not isinstance(found, type) or not hasattr(found, "__dataclass_fields__"):
            raise pickle.UnpicklingError(f"{module}.{name} has no place in an order")
        return found


def arrival_key(meeting: Meeting, number: int) -> str:
    """Where receiver `number` says that it has come."""
    return f"{meeting.name}/arrived/{number}"


def start_key(meeting: Meeting) -> str:
    """Where receivers read whether all have come."""
    return f"{meeting.name}/start"


def start(store: dist.Store, meeting: Meeting, *, joining: bool) -> None:
    """Tells receivers that have arrived to join, or to give up."""
    store.set(start_key(meeting), (_JOIN if joining else _PART).decode())


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
    begun = time.perf_counter()
    try:
        (_, encoded), *buffers = named_tensors
        order = Order.decoded(encoded)
        store = dist.TCPStore(order.host, order.port, is_master=False, timeout=timedelta(seconds=order.timeout_seconds))
    except Exception:
        traceback.print_exc()  # nobody to report to
        return
    parameters = dict(model.named_parameters())
    try:
        _check_shapes(parameters, order.shapes, order.dtype)
        with torch.no_grad():
            checksums = order.task.carry_out(parameters, [buffer for _, buffer in buffers], store)
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # whoever reads the report may use a shared bucket anew
        report = WorkerReport(checksums=checksums, seconds=time.perf_counter() - begun)
    except Exception:
        report = WorkerReport(error=traceback.format_exc())
    try:
        store.set(order.report_key, report.encoded())
    except RuntimeError:
        traceback.print_exc()


def _blank(parameters: Mapping[str, Tensor]) -> None:
    """A server that starts without weights holds random numbers, in the padding too, which nobody sends."""
    for parameter in parameters.values():
        parameter.zero_()


def _check_shapes(parameters: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], dtype: str) -> None:
    """Raises ValueError, with every difference, where the server's tensors are not those that the plan fills."""
    problems = [f"{name}: planned, and not in the server" for name in shapes.keys() - parameters.keys()]
    problems += [f"{name}: in the server, and not planned" for name in parameters.keys() - shapes.keys()]
    for name in shapes.keys() & parameters.keys():
        found, kind = tuple(parameters[name].shape), str(parameters[name].dtype).removeprefix("torch.")
        if (found, kind) != (tuple(shapes[name]), dtype):
            problems.append(f"{name}: {kind} {list(found)} in the server, planned {dtype} {list(shapes[name])}")
    if problems:
        raise ValueError("the server holds other tensors than the plan fills:\n  " + "\n  ".join(sorted(problems)))
