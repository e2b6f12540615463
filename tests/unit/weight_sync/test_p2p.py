"""Shards sent over gloo between threads that are a rank each: what arrives, and what the audit finds."""

from __future__ import annotations

import operator
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.distributed as dist

from oreal_megatron.config import GeometryConfig
from oreal_megatron.conversion.families import family_of
from oreal_megatron.conversion.layout import Layout
from oreal_megatron.conversion.rules import Box
from oreal_megatron.weight_sync import checksums
from oreal_megatron.weight_sync.checksums import ArrivingChecksums, added, checksum, exactly_covered, whole
from oreal_megatron.weight_sync.p2p import Receiver, Rendezvous, Sender, join, rounds, view
from oreal_megatron.weight_sync.planner import ops_by_receiver, ops_by_sender, plan_resharding
from oreal_megatron.weight_sync.sglang_layout import SGLangLayout
from tests.unit.weight_sync.test_planner import huggingface_weights, served, trainer_shards

GEOMETRY = GeometryConfig(
    num_layers=4,
    hidden_size=16,
    ffn_hidden_size=24,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=4,
    vocab_size=100,
    rope_theta=1e4,
    norm_eps=1e-6,
    qkv_bias=True,
    tied_embeddings=False,
    init_std=0.02,
)
TRAINER = Layout(tensor=2, pipeline=2)
SERVER, NUM_SERVERS = SGLangLayout(tensor=2), 2
TABLE = family_of(GEOMETRY).table(GEOMETRY, "causal")


def publish(dtype=torch.float32, bucket_bytes=512):
    """Runs a publication; returns (expected tensors, received tensors), by receiver."""
    plan = plan_resharding(TABLE, GEOMETRY, TRAINER, SERVER)
    assignment = plan.assign(NUM_SERVERS)
    num_receivers = NUM_SERVERS * SERVER.tensor
    # bfloat16 holds whole numbers up to 256 exactly.
    weights = {name: values % 251 for name, values in huggingface_weights(TABLE).items()}
    shards = trainer_shards(TABLE, GEOMETRY, TRAINER, weights)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    rendezvous = Rendezvous("127.0.0.1", store.port, "test", TRAINER.num_ranks, num_receivers, timeout_seconds=60)
    options = {"dtype": dtype, "bucket_bytes": bucket_bytes}

    def send(rank):
        group = join(rendezvous, rank, "gloo")
        sender = Sender(group, rendezvous, rank, ops_by_receiver(assignment, rank), **options)
        sender.send({name: torch.from_numpy(shard).float() for name, shard in shards[rank].items()})

    def receive(number):
        group = join(rendezvous, TRAINER.num_ranks + number, "gloo")
        parameters = {t.name: torch.zeros(t.shape, dtype=dtype) for t in plan.targets[number % SERVER.tensor]}
        receiver = Receiver(group, rendezvous, number, ops_by_sender(assignment, number), **options)
        receiver.receive(parameters, lambda run: None)
        return parameters

    with ThreadPoolExecutor(TRAINER.num_ranks + num_receivers) as pool:
        sending = [pool.submit(send, rank) for rank in range(TRAINER.num_ranks)]
        receiving = [pool.submit(receive, number) for number in range(num_receivers)]
        for future in sending:
            future.result()
        received = [future.result() for future in receiving]
    wanted = [served(weights, GEOMETRY, SERVER, number % SERVER.tensor) for number in range(num_receivers)]
    return wanted, received


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bucket_bytes", [64, 100_000])
def test_receivers_get_their_shards(dtype, bucket_bytes):
    before = threading.active_count()
    wanted, received = publish(dtype, bucket_bytes)
    for want, have in zip(wanted, received, strict=True):
        for name, values in want.items():
            np.testing.assert_array_equal(have[name].float().numpy(), values, err_msg=name)
    assert threading.active_count() <= before + 1


def joined_pair(sender_to, receiver_from, *, keeps_sent=False):
    """A sender and a receiver that have joined a group of two."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    rendezvous = Rendezvous("127.0.0.1", store.port, "test", 1, 1, timeout_seconds=600)
    options = {"dtype": torch.float32, "bucket_bytes": 512}
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda rank: join(rendezvous, rank, "gloo"), range(2))
    sender = Sender(first, rendezvous, 0, sender_to, keeps_sent=keeps_sent, **options)
    return sender, Receiver(second, rendezvous, 0, receiver_from, **options)


@pytest.mark.parametrize("closed", ["sender", "receiver"])
def test_process_that_waits_fails_once_the_other_closes(closed):
    trainer = Layout()
    plan = plan_resharding(TABLE, GEOMETRY, trainer, SGLangLayout())
    assignment = plan.assign(1)
    sender, receiver = joined_pair(ops_by_receiver(assignment, 0), ops_by_sender(assignment, 0))
    weights = huggingface_weights(TABLE)
    shards = {n: torch.from_numpy(s).float() for n, s in trainer_shards(TABLE, GEOMETRY, trainer, weights)[0].items()}
    parameters = {target.name: torch.zeros(target.shape) for target in plan.targets[0]}
    waits = (
        (lambda: receiver.receive(parameters, lambda run: None))
        if closed == "sender"
        else (lambda: sender.send(shards))
    )
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(waits)
        with pytest.raises(TimeoutError):
            waiting.result(0.3)
        (sender if closed == "sender" else receiver).close()
        with pytest.raises(RuntimeError):
            waiting.result(60)


def test_nccl_group_waits_on_the_host_and_leaves_others_as_they_are(monkeypatch):
    """What torch reads when it creates the group; NCCL itself needs two devices (tests/gpu)."""
    seen = []

    class Group:
        class Options:
            pass

        def __init__(self, *arguments):
            seen.append(os.environ.get("TORCH_NCCL_BLOCKING_WAIT"))

    monkeypatch.setattr(dist, "ProcessGroupNCCL", Group, raising=False)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    rendezvous = Rendezvous("127.0.0.1", store.port, "test", 1, 1, timeout_seconds=60)
    for before in (None, "0"):
        if before is not None:
            monkeypatch.setenv("TORCH_NCCL_BLOCKING_WAIT", before)
        join(rendezvous, 0, "nccl")
        assert os.environ.get("TORCH_NCCL_BLOCKING_WAIT") == before
    assert seen == ["1", "1"]


def test_checksums_of_parts_add_up_to_those_of_whole_tensors():
    """The senders' checksums of each rectangle add up to a receiver's checksum of its whole, padded tensor."""
    layout = SGLangLayout(tensor=2, feed_forward_multiple=32)
    plan = plan_resharding(TABLE, GEOMETRY, TRAINER, layout)
    weights = {name: values % 251 for name, values in huggingface_weights(TABLE).items()}
    shards = trainer_shards(TABLE, GEOMETRY, TRAINER, weights)
    for rank in range(layout.tensor):
        expected = added(
            {op.target: checksum(view(torch.from_numpy(shards[sender][op.source]).float(), op.source_box),
                                 op.target_box)}
            for sender, ops in ops_by_sender(plan.assign(1), rank).items()
            for op in ops
        )  # fmt: skip
        tensors = {
            name: torch.from_numpy(values).float() for name, values in served(weights, GEOMETRY, layout, rank).items()
        }
        assert {name: whole(tensor) for name, tensor in tensors.items()} == dict.fromkeys(tensors, 0) | expected
        tensors["model.layers.2.mlp.down_proj.weight"].view(torch.int32)[3, 5] ^= 1
        tensors["model.layers.1.mlp.gate_up_proj.weight"][-1, 0] = 1.0  # in the padding
        wrong = {name for name, tensor in tensors.items() if whole(tensor) != expected.get(name, 0)}
        assert wrong == {"model.layers.2.mlp.down_proj.weight", "model.layers.1.mlp.gate_up_proj.weight"}


def test_checksum_sees_swapped_rows_columns_and_elements():
    tensor = torch.randn(8, 8)
    box = Box((0, 8), (0, 8))
    total = checksum(tensor, box)
    parts = [Box((0, 3), (0, 8)), Box((3, 8), (0, 5)), Box((3, 8), (5, 8))]
    assert sum(checksum(tensor[slice(*b.rows), slice(*b.columns)], b) for b in parts) % 2**64 == total
    swapped = tensor.clone()
    swapped[0, 0], swapped[0, 1] = tensor[0, 1], tensor[0, 0]
    for other in (tensor.flip(0), tensor.flip(1), tensor.t(), swapped, -tensor, tensor.double().float() + 1e-6):
        assert checksum(other, box) != total


def mixed(value: int, multiplier: int, bits: int, shift: int) -> int:
    value = value * multiplier % 2**bits
    return value ^ value >> shift


def reference(tensor: torch.Tensor, box: Box) -> int:
    """The definition of a checksum in Python's integers: signed bytes, weighted by row and by place in the row."""
    rows, columns = (box.rows, box.columns) if box.columns else ((0, 1), box.rows)
    found = tensor.reshape(rows[1] - rows[0], -1).contiguous().view(torch.uint8).numpy().view(np.int8)
    first = columns[0] * tensor.element_size()
    places = [
        mixed(mixed(first + c + 1, 0x5851F42D4C957F2D, 47, 23), 0x14057B7EF767814F, 47, 24) * 2 + 1
        for c in range(found.shape[1])
    ]
    return (
        sum(
            (mixed(rows[0] + r + 1, 0x9E3779B1, 31, 15) * 2 + 1) * sum(map(operator.mul, row, places))
            for r, row in enumerate(found.tolist())
        )
        % 2**64
    )


@pytest.mark.parametrize(
    ("dtype", "shape", "first"),
    [
        (torch.bfloat16, (3, 131_073 + 5), (0, 0)),  # wider than one exact product
        (torch.bfloat16, (300, 1000), (5, 70_000)),
        (torch.float32, (3, 70_000), (2, 9)),
        (torch.float8_e4m3fn, (5, 33), (128, 7)),
        (torch.bfloat16, (77,), (11,)),
    ],
)
def test_checksum_is_the_exact_weighted_sum_of_the_bits(dtype, shape, first):
    """Half of the bytes are -128, the largest in size: no sum may saturate or round."""
    found = torch.randint(0, 256, (*shape[:-1], shape[-1] * dtype.itemsize), dtype=torch.uint8)
    found[..., : found.size(-1) // 2] = 0x80
    tensor = found.view(dtype).view(shape)
    box = Box(*((start, start + size) for start, size in zip(first, shape, strict=True)), *[None] * (2 - len(shape)))
    assert checksum(tensor, box) == reference(tensor, box)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn])
def test_checksum_sees_every_single_bit_flip(dtype):
    tensor = torch.randn(3, 5).to(dtype)
    sums = {whole(tensor)}
    bits = tensor.view(torch.uint8)
    for place in range(bits.numel()):
        for bit in range(8):
            bits.view(-1)[place] ^= 1 << bit
            sums.add(whole(tensor))
            bits.view(-1)[place] ^= 1 << bit
    assert len(sums) == 1 + 8 * bits.numel()  # no two flips have the same sum either


def test_checksum_sees_two_signs_that_change_places():
    """The highest bits of two elements: a sum whose weights lose their high bits there would not see the change."""
    tensor = torch.ones(16, 24, dtype=torch.bfloat16)
    tensor[0, 0] = -1
    sums = {whole(tensor.roll((row, column), (0, 1))) for row in range(16) for column in range(24)}
    assert len(sums) == 16 * 24


def test_checksum_sees_a_shift_by_one_and_a_swap_at_random_places():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        rows, columns = (int(n) for n in torch.randint(2, 40, (2,), generator=generator))
        tensor = torch.randn(rows, columns, generator=generator).bfloat16()
        total = whole(tensor)
        assert whole(tensor.roll(1, 0)) != total != whole(tensor.roll(1, 1))
        assert whole(tensor.flatten().roll(1).view_as(tensor)) != total
        one, other = (int(n) for n in torch.randperm(tensor.numel(), generator=generator)[:2])
        swapped = tensor.clone().flatten()
        swapped[[one, other]] = swapped[[other, one]]
        assert (whole(swapped.view_as(tensor)) == total) == (tensor.flatten()[one] == tensor.flatten()[other])


def test_checksums_of_random_parts_add_up_in_any_order():
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        rows, columns = (int(n) for n in torch.randint(2, 40, (2,), generator=generator))
        tensor = torch.randn(rows, columns, generator=generator).bfloat16()
        row, column = (
            int(torch.randint(rows, (1,), generator=generator)),
            int(torch.randint(columns, (1,), generator=generator)),
        )
        parts = [
            checksum(tensor[slice(*r), slice(*c)], Box(r, c))
            for r in ((row, rows), (0, row))
            for c in ((column, columns), (0, column))
        ]
        assert sum(parts) % 2**64 == sum(parts[::-1]) % 2**64 == whole(tensor)


def test_checksum_of_weights_that_are_cast_is_that_of_the_cast_weights():
    tensor = torch.randn(64, 300)[:, 3:200]
    box = Box((0, 64), (100, 297))
    assert checksum(tensor, box, torch.bfloat16) == checksum(tensor.bfloat16(), box) != checksum(tensor, box)
    assert checksum(tensor[:0], Box((0, 0), (100, 297))) == 0


def test_rounds_give_every_process_one_partner():
    pairs = rounds([(s, r) for s in range(3) for r in range(5)], 3, 5)
    assert len(pairs) == 15
    for k in range(5):
        group = [(s, r) for s, r in pairs if (r - s) % 5 == k]
        assert len({s for s, _ in group}) == len({r for _, r in group}) == len(group)


HALVES = (Box((0, 2), (0, 6)), Box((2, 4), (0, 6)))


def arriving(parameters, parts, after=lambda: None):
    """Checksums of parameters that are written part by part; `after` runs between the last part and the end."""
    sums = ArrivingChecksums(parameters, exactly_covered(parts, parameters))
    for number, (name, box) in enumerate(parts):
        view(parameters[name], box).copy_(torch.full(box.shape, 1.0 + number))
        sums.add_part(name, box)
    after()
    return sums.result()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_arriving_checksums_are_those_of_the_whole_tensors_at_the_end(mode, monkeypatch):
    """Padding, an overlap, memory of two names, and writes that were not announced, before and after the last part."""
    parameters = {name: torch.nn.Parameter(torch.zeros(4, 6)) for name in ("covered", "padded", "overlaps", "late")}
    parameters["tied"] = torch.nn.Parameter(parameters["covered"].data)  # with a count of writes of its own
    parameters["alone"] = torch.nn.Parameter(torch.zeros(4, 6))
    parameters["vector"] = torch.nn.Parameter(torch.zeros(5))
    parameters["empty of parts"] = torch.nn.Parameter(torch.ones(2, 2))
    parts = [
        *((name, box) for name in ("covered", "tied", "alone", "late") for box in HALVES),
        ("padded", HALVES[0]),
        ("overlaps", HALVES[0]),
        ("overlaps", Box((1, 3), (0, 6))),
        ("vector", Box((0, 3), None)),
        ("vector", Box((3, 5), None)),
    ]
    summed = []
    real = checksums.weighted_sum
    monkeypatch.setattr(
        checksums, "weighted_sum", lambda part, *rest: summed.append(part.data_ptr()) or real(part, *rest)
    )
    with mode():
        found = arriving(parameters, parts, after=lambda: parameters["late"].detach()[3, 5].fill_(7.0))
        at_the_end = summed[len(summed) - 6 :]
    assert found == {name: whole(tensor) for name, tensor in parameters.items()}
    ends = ("covered", "padded", "overlaps", "late", "tied", "empty of parts")
    assert at_the_end == [parameters[name].data_ptr() for name in ends]  # alone and vector were summed up by parts


def test_arriving_checksums_of_tensors_without_a_count_of_writes_are_summed_up_at_the_end():
    with torch.inference_mode():
        tensors = {"weight": torch.zeros(4, 6)}
        parts = [("weight", box) for box in HALVES]
        found = arriving(tensors, parts, after=lambda: tensors["weight"][0, 0].fill_(5.0))
        assert found == {"weight": whole(tensors["weight"])}


def test_receiver_reports_a_bucket_once_it_is_written_and_while_the_next_one_travels():
    plan = plan_resharding(TABLE, GEOMETRY, Layout(), SGLangLayout())
    assignment = plan.assign(1)
    sender, receiver = joined_pair(ops_by_receiver(assignment, 0), ops_by_sender(assignment, 0))
    weights = huggingface_weights(TABLE)
    shards = {n: torch.from_numpy(s).float() for n, s in trainer_shards(TABLE, GEOMETRY, Layout(), weights)[0].items()}
    wanted = {n: torch.from_numpy(v).float() for n, v in served(weights, GEOMETRY, SGLangLayout(), 0).items()}
    parameters = {target.name: torch.full(target.shape, -1.0) for target in plan.targets[0]}
    reported = []

    def arrived(run):
        for op in run:
            assert torch.equal(view(parameters[op.target], op.target_box), view(wanted[op.target], op.target_box))
        reported.extend(run)

    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(sender.send, shards)
        receiver.receive(parameters, arrived)
        sending.result(60)
    assert reported == list(receiver.ops)
    receiver.close(), sender.close()
