"""Changes of a bucket: what is encoded, and what arrives in a receiver's tensors."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from oreal_megatron.conversion.layout import Layout
from oreal_megatron.conversion.rules import Box
from oreal_megatron.weight_sync.changes import MAX_GAP, apply_changes, decode_changes, encode_changes, encoded_bytes
from oreal_megatron.weight_sync.p2p import pack
from oreal_megatron.weight_sync.planner import TransferOp, ops_by_receiver, ops_by_sender, plan_resharding
from oreal_megatron.weight_sync.sglang_layout import SGLangLayout
from tests.unit.weight_sync.test_p2p import GEOMETRY, TABLE, joined_pair
from tests.unit.weight_sync.test_planner import huggingface_weights, trainer_shards

NAN = float("nan")


def bits(tensor):
    return tensor.view(torch.int16 if tensor.dtype.itemsize == 2 else torch.int32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.1])
def test_changes_turn_what_was_before_into_what_is_after(dtype, share):
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(3 * MAX_GAP + 5, generator=generator).to(dtype)
    after = before.clone()
    is_changed = torch.rand(len(before), generator=generator) < share
    bits(after)[is_changed] ^= 1
    encoded = encode_changes(before, after)
    places, values = decode_changes(encoded, dtype)
    # Gaps have 16 bits: four elements are sent even if nothing has changed.
    assert encoded.nbytes == encoded_bytes(len(places), dtype) and 0 <= len(places) - is_changed.sum() <= 4
    before[places] = values
    assert torch.equal(bits(before), bits(after))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_changes_of_a_quarter_of_all_bytes_are_none(dtype):
    before = torch.zeros(1000, dtype=dtype)
    assert encode_changes(before, torch.ones_like(before)) is None
    limit = 1000 * dtype.itemsize // (4 * encoded_bytes(1, dtype))  # the first element counts as changed in any case
    for count, is_smaller in ((limit - 1, True), (limit + 1, False)):
        encoded = encode_changes(before, before.index_fill(0, torch.arange(count), 1.0))
        assert (encoded is not None) == is_smaller


def test_bits_are_compared_not_numbers():
    before = torch.tensor([0.0, 1.0, NAN, 0.0, 2.0, *range(3, 43)], dtype=torch.bfloat16)
    after = torch.tensor([0.0, 1.0, NAN, -0.0, NAN, *range(3, 43)], dtype=torch.bfloat16)
    places, values = decode_changes(encode_changes(before, after), torch.bfloat16)
    assert places.tolist() == [0, 3, 4] and torch.equal(bits(values), bits(after[places]))


def test_changes_reach_rectangles_and_vectors():
    matrix, vector = torch.zeros(5, 6), torch.zeros(7)
    run = [
        TransferOp("a", Box((0, 3), (0, 2)), "matrix", Box((1, 4), (3, 5))),
        TransferOp("b", Box((0, 2), None), "vector", Box((5, 7), None)),
        TransferOp("a", Box((3, 4), (0, 2)), "matrix", Box((0, 1), (0, 2))),
    ]
    apply_changes(
        run, torch.tensor([0, 5, 6, 7, 9]), torch.tensor([1.0, 2, 3, 4, 5]), {"matrix": matrix, "vector": vector}
    )
    expected = torch.zeros(5, 6)
    expected[1, 3], expected[3, 4], expected[0, 1] = 1, 2, 5
    assert torch.equal(matrix, expected) and vector.tolist() == [0, 0, 0, 0, 0, 3, 4]


@pytest.mark.parametrize("num_changed", [0, 1, None])
def test_receiver_has_the_weights_after_changes_alone(num_changed):
    """num_changed: of each tensor; None: all, which are sent as they are."""
    trainer = Layout()
    plan = plan_resharding(TABLE, GEOMETRY, trainer, SGLangLayout())
    assignment = plan.assign(1)
    sender, receiver = joined_pair(ops_by_receiver(assignment, 0), ops_by_sender(assignment, 0), keeps_sent=True)
    weights = trainer_shards(TABLE, GEOMETRY, trainer, huggingface_weights(TABLE))[0]
    shards = {name: torch.from_numpy(shard).float() for name, shard in weights.items()}
    received, expected = ({t.name: torch.zeros(t.shape) for t in plan.targets[0]} for _ in range(2))
    sent = []
    with ThreadPoolExecutor(1) as pool:
        for only_changes in (False, True, True):
            arriving = pool.submit(receiver.receive, received, lambda ops: None, only_changes=only_changes)
            sent.append(sender.send(shards, only_changes=only_changes))
            arriving.result(60)
            for op in ops_by_receiver(assignment, 0)[0]:
                flat = torch.empty(op.num_elements)
                pack([op], shards, flat)
                box = op.target_box
                part = expected[op.target][slice(*box.rows)]
                (part if box.columns is None else part[:, slice(*box.columns)]).copy_(flat.view(box.shape))
            assert all(torch.equal(received[name], expected[name]) for name in expected)
            for shard in shards.values():
                shard.view(-1)[:num_changed] += 0.5
    headers = 8 * len(list(receiver._buckets))
    if num_changed is None:
        assert sent[1] == sent[0] + headers
    else:
        assert sent[1] < sent[0] / 2
