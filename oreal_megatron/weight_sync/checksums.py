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

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache
from itertools import combinations

import torch
from torch import Tensor
from torch.nn import functional

from oreal_megatron.conversion.rules import Box, overlap

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
    return int(weighted_sum(part, box, dtype)) % 2**64


def weighted_sum(part: Tensor, box: Box, dtype: torch.dtype | None = None) -> Tensor:
    """Computes `checksum` on the device of `part`, without waiting for it: int64 [], modulo 2^64."""
    dtype = dtype or part.dtype
    rows, (first, last) = (box.rows, box.columns) if box.columns else ((0, 1), box.rows)
    total = torch.zeros((), dtype=torch.int64, device=part.device)  # torch's integers wrap round
    if part.numel() == 0:
        return total
    matrix = part.detach().reshape(rows[1] - rows[0], last - first)
    digits = _column_digits(_table_size(last * dtype.itemsize), part.device)[first * dtype.itemsize :]
    weights = _row_weights(_table_size(rows[1]), part.device)[slice(*rows)]
    step = max(_CHUNK_BYTES[part.device.type] // (matrix.size(1) * dtype.itemsize), 1)
    for chunk, of_chunk in zip(matrix.split(step), weights.split(step), strict=True):
        found = chunk.to(dtype).contiguous().view(torch.int8)
        for start in range(0, found.size(1), _EXACT_WIDTH):
            piece = found[:, start : start + _EXACT_WIDTH]
            total += (_weighted(piece, digits[start : start + piece.size(1)]) * of_chunk).sum()
    return total


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
    return checksum(tensor, _whole_box(tensor))


def _whole_box(tensor: Tensor) -> Box:
    rows, *columns = tensor.shape
    return Box((0, rows), (0, columns[0]) if columns else None)


def added(parts: Iterable[Checksums]) -> Checksums:
    """Adds up the checksums of several parts of the same tensors."""
    total: Checksums = {}
    for part in parts:
        for name, value in part.items():
            total[name] = (total.get(name, 0) + value) % 2**64
    return total


class ArrivingChecksums:
    """Checksums of a model's parameters, summed up while their elements arrive.

    A part is summed up where it lies in its parameter, after it was written and while later parts travel. The result is
    that of a pass over all parameters at the end, because each parameter for which this is not certain is summed up
    whole at the end: if its parts do not cover it exactly once (padding, overlaps), if it shares memory with another
    parameter, or if torch has counted a write to it that was not announced.
    """

    def __init__(self, parameters: Mapping[str, Tensor], covered: Collection[str]):
        """covered: names of the parameters that the parts cover exactly once, see `exactly_covered`."""
        self._parameters = parameters
        owners = Counter(parameter.untyped_storage().data_ptr() for parameter in parameters.values())
        self._versions = {
            name: parameters[name]._version
            for name in covered
            if owners[parameters[name].untyped_storage().data_ptr()] == 1 and not parameters[name].is_inference()
        }
        """Torch's count of writes up to the last one that is known here, for parameters that are summed up by parts."""
        self._sums: dict[str, Tensor] = {}

    def add_part(self, name: str, box: Box) -> None:
        """Sums up a rectangle of a parameter that was written by one operation since the last call for it."""
        if name not in self._versions:
            return
        self._versions[name] += 1
        rows = self._parameters[name].detach()[slice(*box.rows)]
        found = weighted_sum(rows if box.columns is None else rows[:, slice(*box.columns)], box)
        self._sums[name] = self._sums[name] + found if name in self._sums else found

    def add_whole(self, name: str) -> None:
        """Sums up a whole parameter that is complete now, however it was written."""
        parameter = self._parameters[name]
        if parameter.is_inference():
            return
        self._versions[name] = parameter._version
        self._sums[name] = weighted_sum(parameter, _whole_box(parameter))

    def result(self) -> Checksums:
        """Returns the checksums of all parameters, as they are now."""
        for name, parameter in self._parameters.items():
            if name not in self._sums or parameter._version != self._versions[name]:
                self._sums[name] = weighted_sum(parameter, _whole_box(parameter))
        names = list(self._parameters)
        sums = torch.stack([self._sums[name] for name in names]).tolist()  # waits for the device once
        return {name: value % 2**64 for name, value in zip(names, sums, strict=True)}


def exactly_covered(parts: Iterable[tuple[str, Box]], parameters: Mapping[str, Tensor]) -> frozenset[str]:
    """Returns the names of the parameters whose elements lie in exactly one of the rectangles each."""
    boxes: dict[str, list[Box]] = defaultdict(list)
    for name, box in parts:
        boxes[name].append(box)
    return frozenset(
        name
        for name, found in boxes.items()
        if sum(box.num_elements for box in found) == parameters[name].numel()
        and not any(_share_elements(one, other) for one, other in combinations(found, 2))
    )


def _share_elements(one: Box, other: Box) -> bool:
    if overlap(one.rows, other.rows) is None:
        return False
    return one.columns is None or other.columns is None or overlap(one.columns, other.columns) is not None
