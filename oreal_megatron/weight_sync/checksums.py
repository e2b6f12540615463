"""Checksums that compare every element of a tensor on both sides without gathering it.

A checksum adds up the elements' bytes, weighted by their places in the receiver's tensor. It is additive: the checksums
of several trainer ranks' parts add up to the checksum of a server's whole tensor. Padding is zeros and adds nothing, so
padding that is not zero is found too. Checksums have 64 bits, modulo 2^64.

A column's weight has 48 bits. Its eight digits in base 64 are the columns of an int8 matrix, so the sum over a row is a
product of int8 matrices with int32 results, which processors compute faster than any wider product. It is exact in any
order, because no sum reaches 2^31, and therefore the same on every device. Digits stay below 64 because processors
without VNNI add two products of bytes in 16 bits.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from oreal_megatron.conversion.rules import Box

Checksums = dict[str, int]
"""Checksums in [0, 2^64), by the server's name of a tensor."""

_NUM_DIGITS, _DIGIT_BITS = 8, 6
_EXACT_WIDTH = 2**17  # bytes of a row: their products with digits, each below 2^13, add up to less than 2^31
_CHUNK_BYTES = {"cpu": 2**21, "cuda": 2**27}  # a core's cache; enough work for a GPU


def checksum(part: Tensor, box: Box, dtype: torch.dtype | None = None) -> int:
    """Computes the weighted sum of the bytes of `part`, which lies at `box` of its tensor.

    Each byte, as a signed number, is multiplied by an odd weight of its row, 32 bits, and an odd weight of its place in
    the row, 48 bits. No two rows and no two places have the same. A single wrong bit, and two bytes of a row or of a
    column that change places, always change the sum. Other errors cancel only by chance: the weight of an element's
    highest bit has 56 bits or more in the sum. A vector is one row.
    dtype: type of the elements that are compared; default: that of `part`.
    """
    dtype = dtype or part.dtype
    rows, (first, last) = (box.rows, box.columns) if box.columns else ((0, 1), box.rows)
    if part.numel() == 0:
        return 0
    matrix = part.detach().reshape(rows[1] - rows[0], last - first)
    digits = _column_digits(_table_size(last * dtype.itemsize), part.device)[first * dtype.itemsize :]
    weights = _row_weights(_table_size(rows[1]), part.device)[slice(*rows)]
    step = max(_CHUNK_BYTES[part.device.type] // (matrix.size(1) * dtype.itemsize), 1)
    total = torch.zeros((), dtype=torch.int64, device=part.device)  # torch's integers wrap round
    for chunk, of_chunk in zip(matrix.split(step), weights.split(step), strict=True):
        found = chunk.to(dtype).contiguous().view(torch.int8)
        for start in range(0, found.size(1), _EXACT_WIDTH):
            piece = found[:, start : start + _EXACT_WIDTH]
            total += (_weighted(piece, digits[start : start + piece.size(1)]) * of_chunk).sum()
    return int(total) % 2**64


def _weighted(found: Tensor, digits: Tensor) -> Tensor:
    """Computes the sum of each row of bytes, weighted by the digits of the places: int64 [rows]."""
    num_rows = len(found)
    if found.is_cuda:  # cuBLAS takes more than 16 rows, each of them aligned; at least one zero more always copies
        missing = 16 - found.size(1) % 16
        found = functional.pad(found, (0, missing, 0, max(17 - num_rows, 0)))
        digits = functional.pad(digits, (0, 0, 0, missing))
    sums = torch._int_mm(found, digits)[:num_rows].long()
    powers = torch.arange(0, _NUM_DIGITS * _DIGIT_BITS, _DIGIT_BITS, device=found.device)
    return (sums << powers).sum(1)


@lru_cache(maxsize=32)
def _column_digits(num_places: int, device: torch.device) -> Tensor:
    """Returns the digits of the weights of places in a row, lowest first, int8 [num_places, 8]; the lowest is odd."""
    places = torch.arange(1, num_places + 1, device=device)
    # Odd multipliers and shifts to the right keep different places different, modulo 2^47.
    hashed = _shift_mix(places * 0x5851F42D4C957F2D & 2**47 - 1, 23)
    weights = _shift_mix(hashed * 0x14057B7EF767814F & 2**47 - 1, 24) * 2 + 1
    powers = torch.arange(0, _NUM_DIGITS * _DIGIT_BITS, _DIGIT_BITS, device=device)
    return (weights[:, None] >> powers & 2**_DIGIT_BITS - 1).to(torch.int8)


@lru_cache(maxsize=32)
def _row_weights(num_rows: int, device: torch.device) -> Tensor:
    """Returns the weights of rows, int64 [num_rows], odd numbers of 32 bits."""
    rows = torch.arange(1, num_rows + 1, device=device)
    return _shift_mix(rows * 0x9E3779B1 & 2**31 - 1, 15) * 2 + 1


def _shift_mix(values: Tensor, bits: int) -> Tensor:
    return values ^ values >> bits


def _table_size(num_places: int) -> int:
    """Returns the size of the table that is computed once for tensors of about this size."""
    return 1 << (num_places - 1).bit_length()


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
