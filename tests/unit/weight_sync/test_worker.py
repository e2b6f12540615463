"""A worker executes commands one by one: what it keeps between them, and what it refuses."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import pytest
import torch

from oreal_megatron.conversion.rules import Box
from oreal_megatron.weight_sync.commands import pickled
from oreal_megatron.weight_sync.fp8_blocks import E4M3, quantise_into
from oreal_megatron.weight_sync.p2p import Rendezvous
from oreal_megatron.weight_sync.planner import TransferOp
from oreal_megatron.weight_sync.sglang_layout import scales_of
from oreal_megatron.weight_sync.worker import Command, Receive, Unpack, Worker, load

SIZE = 128
HALVES = [(0, SIZE // 2), (SIZE // 2, SIZE)]
NAME = "model.layers.0.mlp.down_proj.weight"


def parameters() -> dict[str, torch.Tensor]:
    """An FP8 weight and its scales, with contents that a publication must overwrite."""
    return {NAME: torch.full((SIZE, SIZE), 7.0).to(E4M3), scales_of(NAME): torch.full((1, 1), 7.0)}


def command(task, port=0) -> Command:
    return Command("127.0.0.1", port, 5.0, "report", dtype="bfloat16", parameters={}, task=task)


def unpack(worker, tensors, rows, weight, *, is_first) -> None:
    """Has the worker unpack some rows of a weight."""
    box = Box(rows, (0, SIZE))
    task = Unpack([TransferOp(NAME, box, NAME, box)], is_first=is_first, file=None)
    worker.execute(command(task), tensors, [weight[slice(*rows)].flatten()], store=None)


def quantised(weight) -> dict[str, torch.Tensor]:
    expected = parameters()
    quantise_into(expected[NAME], expected[scales_of(NAME)], weight)
    return expected


def assert_equal(tensors, expected) -> None:
    for name, tensor in expected.items():
        assert torch.equal(tensors[name].float(), tensor.float()), name


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0)).bfloat16()


def test_worker_quantises_a_weight_once_all_of_it_has_arrived(weight):
    worker, tensors = Worker(), parameters()
    unpack(worker, tensors, HALVES[0], weight, is_first=True)
    assert not tensors[NAME].float().any()  # half a block has no scale yet
    unpack(worker, tensors, HALVES[1], weight, is_first=False)
    assert_equal(tensors, quantised(weight))


def test_workers_share_no_state(weight):
    one, other, tensors, untouched = Worker(), Worker(), parameters(), parameters()
    unpack(one, tensors, HALVES[0], weight, is_first=True)
    unpack(other, untouched, HALVES[1], weight, is_first=False)
    assert_equal(untouched, parameters())
    unpack(one, tensors, HALVES[1], weight, is_first=False)
    assert_equal(tensors, quantised(weight))


def test_worker_forgets_a_publication_that_was_interrupted(weight):
    worker, tensors = Worker(), parameters()
    unpack(worker, tensors, HALVES[1], weight + 1, is_first=True)
    unpack(worker, tensors, HALVES[0], weight, is_first=True)
    assert not tensors[NAME].float().any()
    unpack(worker, tensors, HALVES[1], weight, is_first=False)
    assert_equal(tensors, quantised(weight))


def test_worker_audit_sums_up_parameters_without_changing_them():
    tensors = parameters()
    checksums = Worker().execute(command("checksums"), tensors, [], store=None)
    assert checksums.keys() == tensors.keys() and all(checksums.values())
    assert_equal(tensors, parameters())


def test_command_refuses_objects_of_other_packages():
    foreign = torch.frombuffer(bytearray(pickle.dumps(Path("x"))), dtype=torch.uint8)
    with pytest.raises(pickle.UnpicklingError):
        Command.decoded(foreign)


def test_load_never_raises_and_logs_what_it_cannot_report(caplog):
    load(torch.nn.Linear(1, 1), [("command", torch.zeros(4, dtype=torch.uint8))])
    assert "UnpicklingError" in caplog.text


class BrokenReceiver:
    """A receiver whose sender is gone."""

    def __init__(self, rendezvous: Rendezvous):
        self.rendezvous, self.ops, self.is_closed = rendezvous, (), False

    def receive(self, parameters, arrived, *, only_changes) -> None:
        raise RuntimeError("connection reset")

    def close(self) -> None:
        self.is_closed = True


def test_worker_that_fails_closes_its_connections():
    """A group of NCCL stays open without, and the other senders wait for this receiver until their timeout."""
    rendezvous = Rendezvous("127.0.0.1", 1, "name", num_senders=1, num_receivers=1, timeout_seconds=5.0)
    worker, receiver = Worker(), BrokenReceiver(rendezvous)
    worker._receiver = receiver
    task = Receive(rendezvous, number=0, backend="nccl", bucket_bytes=4, ops=None)
    with pytest.raises(RuntimeError, match="connection reset"):
        worker.execute(command(task), parameters(), [], store=None)
    assert receiver.is_closed and worker._receiver is None


def test_a_command_reaches_sglang_by_functions_that_it_accepts(
    monkeypatch,
):
    """megatron-core 0.19 puts a function of its own in the place of torch.storage._load_from_bytes."""

    class Accepting(pickle.Unpickler):
        def find_class(self, module, name):
            assert (module, name) in {("torch", "ByteTensor"), ("builtins", "bytearray")}  # SGLang's list has them
            return super().find_class(module, name)

    monkeypatch.setattr(torch.storage, "_load_from_bytes", Box)
    sent = command(Unpack([], is_first=True, file="bucket"))
    ((name, tensor),) = Accepting(io.BytesIO(pickled([("command", sent.encoded())]))).load()
    assert name == "command" and Command.decoded(tensor) == sent
