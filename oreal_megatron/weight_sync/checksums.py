"""Checksums that compare every element of a tensor on both sides without gathering it.

A checksum adds up the elements' bits, weighted by their places in the receiver's tensor. It is additive: the checksums
of several trainer ranks' parts add up to the checksum of a server's whole tensor. Padding is zeros and adds nothing, so
padding that is not zero is found too. Checksums have 64 bits, modulo 2^64.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from oreal_megatron.conversion.rules import Box

Checksums = dict[str, int]
"""Checksums in [0, 2^64), by the server's name of a tensor."""

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Multiplicative hashing: odd constants spread neighbouring indices over 32 bits. Rows and columns have different ones,
# so that a transpose changes the sum.
_ROW, _COLUMN = 0x9E3779B1, 0x85EBCA6B

_CHUNK_ELEMENTS = 2**20  # a checksum takes 8 bytes an element while it is computed


def checksum(part: Tensor, box: Box) -> int:
    """Computes the weighted sum of the bits of `part`, which lies at `box` of its tensor.

    Each element's bits are multiplied by an odd weight of its row and an odd weight of its column: a wrong bit, a wrong
    place and a swap of two elements all change the sum.
    """
    columns = None if box.columns is None else _weights(box.columns, _COLUMN, part.device)
    rows = _weights(box.rows, _ROW, part.device)
    step = max(_CHUNK_ELEMENTS // max(part[:1].numel(), 1), 1)
    total = torch.zeros((), dtype=torch.int64, device=part.device)  # torch's integers wrap round
    for chunk, weights in zip(part.split(step), rows.split(step), strict=True):
        bits = chunk.contiguous().view(_INTEGERS[chunk.element_size()]).long()
        if columns is not None:
            bits = (bits * columns).sum(-1)
        total += (bits * weights).sum()
    return int(total) % 2**64


def _weights(interval: tuple[int, int], multiplier: int, device: torch.device) -> Tensor:
    places = torch.arange(interval[0] + 1, interval[1] + 1, device=device)
    return (places * multiplier & 0xFFFFFFFF) | 1


def whole(tensor: Tensor) -> int:
    """Computes the checksum of a whole tensor."""
    rows, *columns = tensor.shape
    return checksum(tensor.detach(), Box((0, rows), (0, columns[0]) if columns else None))


def added(parts: Iterable[Checksums]) -> Checksums:
    """Adds up the checksums of several parts of the same tensors."""
    total: Checksums = {}
    for part in parts:
        for name, value in part.items():
            total[name] = (total.get(name, 0) + value) % 2**64
    return total
