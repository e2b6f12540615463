"""Checksums that compare every element of a tensor on both sides without gathering it.

A checksum adds up the elements' bits, weighted by their places in the receiver's tensor. It is additive: the checksums
of several trainer ranks' parts add up to the checksum of a server's whole tensor. Padding is zeros and adds nothing, so
padding that is not zero is found too. Checksums have 64 bits, modulo 2^64.

The sum over a row is a matrix-vector product in float64 that is exact in any order, since no partial sum reaches 2^53.
It is the fastest such sum that torch has on a CPU, and the same on every device.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from oreal_megatron.conversion.rules import Box

Checksums = dict[str, int]
"""Checksums in [0, 2^64), by the server's name of a tensor."""

# Multiplicative hashing: odd constants spread neighbouring places. Rows and columns have different ones, so that a
# transpose changes the sum.
_ROW, _COLUMN = 0x9E3779B1, 0x85EBCA6B
_ROW_BITS, _COLUMN_BITS = 32, 21
_EXACT_WIDTH = 2**53 // 2**15 // 2**_COLUMN_BITS  # columns of 16 bits each whose weighted sum float64 holds exactly

_CPU_CHUNK = 2**17  # elements, whose float64 values, 1 MiB, stay in a core's cache
_GPU_CHUNK = 2**24  # elements, 128 MiB as float64; smaller ones would cost more to launch than to compute


def checksum(part: Tensor, box: Box, dtype: torch.dtype | None = None) -> int:
    """Computes the weighted sum of the bits of `part`, which lies at `box` of its tensor.

    Each 16 bits of an element are multiplied by an odd weight of their row and an odd weight of their column, and no
    two of the weights are equal: a wrong bit, a wrong place and a swap of two elements all change the sum.
    dtype: type of the elements that are compared; default: that of `part`.
    """
    dtype = dtype or part.dtype
    halves = max(dtype.itemsize // 2, 1)
    first, last = box.columns or (0, 1)
    columns = _weights((first * halves, last * halves), _COLUMN, _COLUMN_BITS, part.device).double()
    rows = _weights(box.rows, _ROW, _ROW_BITS, part.device)
    matrix = part.detach().reshape(len(part), last - first)
    chunk_elements = _CPU_CHUNK if part.device.type == "cpu" else _GPU_CHUNK
    step = max(chunk_elements // max(matrix.size(1), 1), 1)
    total = torch.zeros((), dtype=torch.int64, device=part.device)  # torch's integers wrap round
    for chunk, weights in zip(matrix.split(step), rows.split(step), strict=True):
        bits = chunk.to(dtype).contiguous().view(torch.uint8 if dtype.itemsize == 1 else torch.int16).double()
        for piece, of_piece in zip(bits.split(_EXACT_WIDTH, 1), columns.split(_EXACT_WIDTH), strict=True):
            total += (torch.mv(piece, of_piece).long() * weights).sum()
    return int(total) % 2**64


def _weights(interval: tuple[int, int], multiplier: int, bits: int, device: torch.device) -> Tensor:
    """Returns an odd weight of `bits` bits for each place, int64; different ones for 2^(bits - 1) places in a row."""
    places = torch.arange(interval[0] + 1, interval[1] + 1, device=device)
    return (places * multiplier & (2 ** (bits - 1) - 1)) * 2 + 1


def whole(tensor: Tensor) -> int:
    """Computes the checksum of a whole tensor."""
    rows, *columns = tensor.shape
    return checksum(tensor, Box((0, rows), (0, columns[0]) if columns else None))


def added(parts: Iterable[Checksums]) -> Checksums:
    """Adds up the checksums of several parts of the same tensors."""
    total: Checksums = {}
    for part in parts:
        for name, value in part.items():
            total[name] = (total.get(name, 0) + value) % 2**64
    return total
