"""FP8 weights as SGLang serves them: e4m3, with a power of two as the scale of each block of 128 x 128.

The arithmetic is that of SGLang's own `per_block_cast_to_fp8`, whose scales are those of Transformer Engine's blockwise
recipe. Every step is exact or one correctly rounded operation, so that trainer and servers compute the same bits on any
device. To quantise a part of a weight, only the largest value of each block must be known of the other parts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from oreal_megatron.config import SERVED_BLOCK
from oreal_megatron.conversion.rules import Box, Interval

E4M3 = torch.float8_e4m3fn
_SMALLEST_AMAX = 1e-4
"""SGLang's lower bound of a block's largest value, so that a block of zeros has a scale too."""
_MANTISSA = 0x7FFFFF


def block_amax(part: Tensor, box: Box) -> tuple[Tensor, tuple[slice, slice]]:
    """Returns (largest |value| of each block, index of these blocks) for a part that lies at `box` of a weight."""
    (rows, columns), _ = _blocks(box)
    return _in_blocks(part.abs(), box).amax((1, 3)).float(), (slice(*rows), slice(*columns))


def scales_for(amax: Tensor) -> Tensor:
    """Returns, in fp32, the smallest powers of two that bring each block's largest value into e4m3's range."""
    needed = amax.clamp_min(_SMALLEST_AMAX) / torch.finfo(E4M3).max
    # Rounds up to a power of two: a mantissa that is not zero carries into the exponent.
    return ((needed.view(torch.int32) + _MANTISSA) & ~_MANTISSA).view(torch.float32)


def quantised(part: Tensor, box: Box, scales: Tensor) -> Tensor:
    """Returns, in e4m3, a part that lies at `box` of its weight. scales: scales of all blocks of the weight."""
    (rows, columns), (top, left) = _blocks(box)
    divided = _in_blocks(part, box).float() / scales[slice(*rows), None, slice(*columns), None]
    whole = divided.to(E4M3).reshape(-1, (columns[1] - columns[0]) * SERVED_BLOCK)
    return whole[top : top + part.size(0), left : left + part.size(1)]


def quantise_into(weight: Tensor, scales: Tensor, source: Tensor) -> None:
    """Quantises all of `source` into a server's e4m3 weight and its scales."""
    box = Box((0, source.size(0)), (0, source.size(1)))
    scales.copy_(scales_for(block_amax(source, box)[0]))
    weight.copy_(quantised(source, box, scales))


def _blocks(box: Box) -> tuple[tuple[Interval, Interval], tuple[int, int]]:
    """Returns the rows and columns of the blocks that a box touches, and its offset within the first block."""
    assert box.columns is not None, "weights of linear layers have two dimensions"
    rows, columns = ((start // SERVED_BLOCK, -(-stop // SERVED_BLOCK)) for start, stop in (box.rows, box.columns))
    return (rows, columns), (box.rows[0] % SERVED_BLOCK, box.columns[0] % SERVED_BLOCK)


def _in_blocks(part: Tensor, box: Box) -> Tensor:
    """Returns a part as [blocks, 128, blocks, 128], with zeros where its blocks reach beyond it."""
    (rows, columns), (top, left) = _blocks(box)
    height, width = ((stop - start) * SERVED_BLOCK for start, stop in (rows, columns))
    filled = F.pad(part, (left, width - left - part.size(1), top, height - top - part.size(0)))
    return filled.view(rows[1] - rows[0], SERVED_BLOCK, columns[1] - columns[0], SERVED_BLOCK)
