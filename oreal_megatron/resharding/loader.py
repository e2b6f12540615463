"""The server's side of direct resharding: a custom weight loader that every worker of a stock SGLang runs.

    python -m sglang.launch_server ... --custom-weight-loader oreal_megatron.resharding.loader.load

A POST of /update_weights_from_tensor with `load_format` of that name hands each worker an order: a few hundred bytes,
and its part of the plan the first time. The weights come beside, from the trainer's ranks. An exception in here would
end the server, so every outcome, good or bad, is reported in the meeting's store.
"""

from __future__ import annotations

import json
import pickle
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from oreal_megatron.resharding.plan import Rectangle
from oreal_megatron.resharding.transport import Meeting, Receiver, join

LOADER = f"{__name__}.load"
"""What the server is started with and what `load_format` must be."""


@dataclass(frozen=True)
class Order:
    """What one worker shall do in one publication."""

    meeting: Meeting
    number: int
    """The worker's, among all receivers."""
    publication: str
    dtype: str
    bucket_bytes: int
    backend: str
    shapes: Mapping[str, tuple[int, ...]] | None
    """What the plan takes the worker's tensors for; None with `rectangles`: as before in this meeting."""
    rectangles: Mapping[int, Sequence[Rectangle]] | None

    def encoded(self) -> Tensor:
        """uint8 [n], as a tensor is all that the endpoint carries."""
        return torch.frombuffer(bytearray(pickle.dumps(self)), dtype=torch.uint8)

    @classmethod
    def decoded(cls, tensor: Tensor) -> Order:
        order = pickle.loads(tensor.cpu().numpy().tobytes())
        assert isinstance(order, cls)
        return order


def report_key(meeting: Meeting, publication: str, number: int) -> str:
    """Where worker `number` leaves its report in the meeting's store."""
    return f"resharding/{meeting.name}/{publication}/{number}"


@dataclass(frozen=True)
class WorkerReport:
    """What a worker says about a publication."""

    error: str | None = None
    checksums: Mapping[str, int] | None = None
    receive_seconds: float = 0.0
    audit_seconds: float = 0.0

    def encoded(self) -> str:
        return json.dumps(self.__dict__)

    @classmethod
    def decoded(cls, text: bytes | str) -> WorkerReport:
        return cls(**json.loads(text))


_joined: dict[str, Receiver] = {}
"""The receiver of the present meeting, by the meeting's name."""


def load(model: torch.nn.Module, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
    """SGLang's call. named_tensors: one, the encoded order."""
    (_, encoded), *_ = named_tensors
    order = Order.decoded(encoded)
    store = dist.TCPStore(
        order.meeting.host,
        order.meeting.port,
        is_master=False,
        timeout=timedelta(seconds=order.meeting.timeout_seconds),
    )
    try:
        report = _carried_out(order, dict(model.named_parameters()))
    except Exception:
        _joined.clear()
        report = WorkerReport(error=traceback.format_exc())
    store.set(report_key(order.meeting, order.publication, order.number), report.encoded())


def _carried_out(order: Order, parameters: dict[str, Any]) -> WorkerReport:
    start = time.perf_counter()
    receiver = _receiver(order, parameters)
    receiver.receive(parameters)
    received = time.perf_counter()
    checksums = receiver.audit(parameters)
    return WorkerReport(
        checksums=checksums, receive_seconds=received - start, audit_seconds=time.perf_counter() - received
    )


def _receiver(order: Order, parameters: Mapping[str, Tensor]) -> Receiver:
    meeting = order.meeting
    if meeting.name not in _joined:
        if order.rectangles is None or order.shapes is None:
            raise ValueError(f"the worker has not joined meeting {meeting.name}, and the order has no plan")
        _joined.clear()
        # Joined first, whatever comes: the senders then hear of a refusal at once, by a closed connection.
        group = join(meeting, meeting.num_senders + order.number, order.backend)
        _check_shapes(parameters, order.shapes, order.dtype)
        _joined[meeting.name] = Receiver(
            group,
            order.number,
            meeting.num_receivers,
            order.rectangles,
            meeting.num_senders,
            dtype=getattr(torch, order.dtype),
            bucket_bytes=order.bucket_bytes,
        )
    return _joined[meeting.name]


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
