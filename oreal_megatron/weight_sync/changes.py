"""Changes between two publications: the elements of a bucket whose bits differ from those that were sent before.

After an update with a small learning rate most weights in bf16 are the same bits: an update below half the distance to
the next number that bf16 has is lost in rounding. What remains is sent as values and as the gaps between their places.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from oreal_megatron.weight_sync.planner import TransferOp

MAX_GAP = 2**16 - 1
"""Elements at every multiple of it count as changed, so that each gap fits into 16 bits."""
_LARGEST_SHARE = 1 / 4
"""Share of the bytes of all elements from which on all are sent. The places of fewer changes, 8 bytes each while they
are found and written, take at most half as much memory as all elements."""
_GAP_BYTES = torch.uint16.itemsize
_BITS = {2: torch.int16, 4: torch.int32}
"""Integers that compare floats bit by bit, by bytes of an element: NaN equals itself, and 0.0 is not -0.0."""


def encoded_bytes(count: int, dtype: torch.dtype) -> int:
    """Returns the bytes of `count` changed elements."""
    return count * (dtype.itemsize + _GAP_BYTES)


def encode_changes(before: Tensor, after: Tensor) -> Tensor | None:
    """Returns the changed elements of a flat tensor as bytes, uint8 [n]: values, then gaps between their places.

    Returns None where they would be a quarter of the bytes of all elements or more. before, after: floats of 16 or 32
    bits, [elements].
    """
    bits = _BITS[after.dtype.itemsize]
    is_changed = before.view(bits) != after.view(bits)
    is_changed[::MAX_GAP] = True
    if encoded_bytes(int(is_changed.count_nonzero()), after.dtype) >= _LARGEST_SHARE * after.nbytes:
        return None
    places = is_changed.nonzero().squeeze(1)
    gaps = places.diff(prepend=places[:1]).to(torch.uint16)
    return torch.cat([after[places].view(torch.uint8), gaps.view(torch.uint8)])


def decode_changes(encoded: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns (places, int64 [count], and values, `dtype` [count]) of changed elements.

    encoded: from `encode_changes`.
    """
    count = len(encoded) // encoded_bytes(1, dtype)
    values, gaps = encoded.split([count * dtype.itemsize, count * _GAP_BYTES])
    return gaps.view(torch.uint16).long().cumsum(0), values.view(dtype)


def apply_changes(
    run: Sequence[TransferOp], places: Tensor, values: Tensor, destinations: Mapping[str, Tensor]
) -> None:
    """Writes changed elements of a bucket to their places in a receiver's tensors.

    run: ops of the bucket. places: in the bucket, ascending. destinations: by SGLang's name.
    """
    ends = torch.tensor([op.num_elements for op in run], device=places.device).cumsum(0)
    counts = torch.searchsorted(places, ends).diff(prepend=ends.new_zeros(1)).tolist()
    first = 0
    for op, mine, new in zip(run, places.split(counts), values.split(counts), strict=True):
        tensor, box = destinations[op.target].detach(), op.target_box
        if box.columns is None:
            tensor[mine - first + box.rows[0]] = new
        else:
            width = box.columns[1] - box.columns[0]
            rows, columns = (mine - first) // width + box.rows[0], (mine - first) % width + box.columns[0]
            tensor[rows, columns] = new
        first += op.num_elements
