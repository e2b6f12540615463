"""Weights in FP8 as SGLang serves them: e4m3, and a power of two a block of 128 x 128. The same bits on both sides.

The arithmetic of SGLang's own `per_block_cast_to_fp8`, whose scales are those of Transformer Engine's blockwise recipe.
Every step is exact, or one correctly rounded operation, so that devices agree. What a part of a weight needs of the
rest of its blocks is their largest value alone: whoever holds parts can quantise them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from oreal_megatron.config import SERVED_BLOCK
from oreal_megatron.conversion.rules import Box, Interval

E4M3 = torch.float8_e4m3fn
_SMALLEST_AMAX = 1e-4
"""SGLang's; a block of zeros has a scale too."""
_MANTISSA = 0x7FFFFF


def block_amax(part: Tensor, box: Box) -> tuple[Tensor, tuple[slice, slice]]:
    """(largest |value| by block, which blocks of the weight), of a part that lies at `box` of it."""
    (rows, columns), _ = _blocks(box)
    return _in_blocks(part.abs(), box).amax((1, 3)).float(), (slice(*rows), slice(*columns))


def scales_for(amax: Tensor) -> Tensor:
    """fp32: the smallest powers of two that bring each block's largest value into e4m3's range."""
    needed = amax.clamp_min(_SMALLEST_AMAX) / torch.finfo(E4M3).max
    # Up to a power of two: what is left of the mantissa carries into the exponent.
    return ((needed.view(torch.int32) + _MANTISSA) & ~_MANTISSA).view(torch.float32)


def quantised(part: Tensor, box: Box, scales: Tensor) -> Tensor:
    """e4m3, of a part that lies at `box` of its weight. scales: of all blocks of the weight."""
    (rows, columns), (top, left) = _blocks(box)
    divided = _in_blocks(part, box).float() / scales[slice(*rows), None, slice(*columns), None]
    whole = divided.to(E4M3).reshape(-1, (columns[1] - columns[0]) * SERVED_BLOCK)
    return whole[top : top + part.size(0), left : left + part.size(1)]


def quantise_into(weight: Tensor, scales: Tensor, source: Tensor) -> None:
    """Fills a server's e4m3 weight and its scales with all of `source`."""
    box = Box((0, source.size(0)), (0, source.size(1)))
    scales.copy_(scales_for(block_amax(source, box)[0]))
    weight.copy_(quantised(source, box, scales))


def _blocks(box: Box) -> tuple[tuple[Interval, Interval], tuple[int, int]]:
    """The rows and columns of blocks that a box touches, and where it begins within the first one."""
    assert box.columns is not None, "weights of linear layers have two dimensions"
    rows, columns = ((start // SERVED_BLOCK, -(-stop // SERVED_BLOCK)) for start, stop in (box.rows, box.columns))
    return (rows, columns), (box.rows[0] % SERVED_BLOCK, box.columns[0] % SERVED_BLOCK)


def _in_blocks(part: Tensor, box: Box) -> Tensor:
    """[blocks, 128, blocks, 128], with zeros where the part has nothing."""
    (rows, columns), (top, left) = _blocks(box)
    height, width = ((stop - start) * SERVED_BLOCK for start, stop in (rows, columns))
    filled = F.pad(part, (left, width - left - part.size(1), top, height - top - part.size(0)))
    return filled.view(rows[1] - rows[0], SERVED_BLOCK, columns[1] - columns[0], SERVED_BLOCK)
