"""Description of a packed row for attention: the bounds of its segments, their prefixes, and positions.

Shapes: T tokens of a row. A segment of n tokens continues a prefix of p tokens, which may have none (p = 0).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from oreal_megatron.data.packing import TokenBatch

# Segments whose lengths are within this factor share one padded call: a trade of fewer calls for unused scores.
_LENGTH_SPREAD = 1.25


@dataclass
class PackedRow(PackedSeqParams):
    """Megatron-Core's description of a packed row, with what the local attention reads besides."""

    positions: Tensor | None = None
    """Positions of this rank's tokens in their sequences, int64 [T / context ranks]."""
    prefixes: Sequence[tuple[int, int]] = ()
    """Start and end of each segment's prefix in the row; equal where a segment has none."""

    @classmethod
    def of(cls, bounds: Any, max_seqlen: int, positions: Tensor, prefixes: Sequence[tuple[int, int]]) -> PackedRow:
        """Makes a row. bounds: int32 [S + 1], a tensor, or an array where tensors have no values."""
        return cls(
            qkv_format="thd",
            cu_seqlens_q=bounds,
            cu_seqlens_kv=bounds,
            max_seqlen_q=max_seqlen,
            max_seqlen_kv=max_seqlen,
            positions=positions,
            prefixes=prefixes,
        )

    @functools.cached_property
    def calls(self) -> list[AttentionCall | slice]:
        """Segments that attend together, and single ones without a prefix. All layers use them."""
        assert self.positions is not None
        bounds = self.cu_seqlens_q.tolist()
        segments = [
            _Segment(*segment, *prefix)
            for segment, prefix in zip(itertools.pairwise(bounds), self.prefixes, strict=True)
            if segment[1] > segment[0]
        ]
        device = self.positions.device
        return [
            slice(similar[0].start, similar[0].end)
            if len(similar) == 1 and not similar[0].prefix_length
            else AttentionCall.of(similar, device)
            for similar in _similar_lengths(segments)
        ]


def packed_row(batch: TokenBatch, positions: Tensor) -> PackedRow:
    """Returns the description of a micro-batch. positions: of this rank's tokens, int64 [T / context ranks]."""
    return PackedRow.of(batch.cu_seqlens, batch.max_seqlen, positions, batch.prefixes)


@dataclass(frozen=True)
class _Segment:
    start: int
    end: int
    prefix_start: int
    prefix_end: int

    @property
    def length(self) -> int:
        return self.end - self.start

    @property
    def prefix_length(self) -> int:
        return self.prefix_end - self.prefix_start

    @property
    def num_keys(self) -> int:
        return self.prefix_length + self.length


@dataclass(frozen=True)
class AttentionCall:
    """N segments that attend in one call, padded to Q queries and K keys."""

    num_segments: int
    queries: Tensor
    """Tokens of the queries, int64 [N * Q]; those of padding repeat a segment's last token."""
    keys: Tensor
    """Tokens of the keys, int64 [N * K]: each segment's prefix, then the segment."""
    mask: Tensor | None
    """Keys that a query sees, bool [N, 1, Q, K]; None: those up to its own."""
    real: Tensor
    """Queries that are no padding, as int64 indices of [N * Q]."""
    tokens: Tensor
    """Tokens of `real`, int64."""

    @classmethod
    def of(cls, segments: Sequence[_Segment], device: torch.device) -> AttentionCall:
        """Makes the call of segments of similar length."""
        start, prefix_start, length, prefix = (
            torch.tensor([getattr(segment, name) for segment in segments])[:, None]
            for name in ("start", "prefix_start", "length", "prefix_length")
        )
        query = torch.arange(int(length.max()))
        key = torch.arange(int((prefix + length).max()))
        own_key = start + (key - prefix).minimum(length - 1)
        queries = (start + query.minimum(length - 1)).flatten()
        real = torch.where((query < length).flatten())[0]
        # Padding is on the right, so that the causal mask alone keeps real queries from it.
        seen = key <= (prefix + query)[:, :, None]
        return cls(
            num_segments=len(segments),
            queries=queries.to(device),
            keys=(prefix_start + key).where(key < prefix, own_key).flatten().to(device),
            mask=seen[:, None].to(device) if prefix.any() else None,
            real=real.to(device),
            tokens=queries[real].to(device),
        )


def _similar_lengths(segments: Sequence[_Segment]) -> list[list[_Segment]]:
    """Groups segments with similar numbers of queries and of keys, those without a prefix first, shortest first."""
    groups: list[list[_Segment]] = []
    shortest = longest = 0
    for segment in sorted(segments, key=lambda s: (s.prefix_length > 0, s.num_keys, s.length, s.start)):
        lower, upper = min(shortest, segment.length), max(longest, segment.length)
        if (
            groups
            and (segment.prefix_length > 0) == (groups[-1][0].prefix_length > 0)
            and segment.num_keys <= _LENGTH_SPREAD * groups[-1][0].num_keys
            and upper <= _LENGTH_SPREAD * lower
        ):
            groups[-1].append(segment)
            shortest, longest = lower, upper
        else:
            groups.append([segment])
            shortest = longest = segment.length
    return groups
