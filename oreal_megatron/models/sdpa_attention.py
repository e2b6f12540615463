"""Core attention of the local layer spec with torch's scaled_dot_product_attention.

Megatron-Core's own DotProductAttention materializes the score matrix and refuses packed sequences. The class here
accepts the three kinds of input of this package:

    packed    q [T, heads, dim], k/v [T, groups, dim], segments in PackedSeqParams   training and scoring
    prefill   q [S, B, heads, dim], k/v [S, B, groups, dim], left padding in the mask  generation, prompts
    decode    q [1, B, heads, dim], k/v [S, B, groups, dim]                            generation, next tokens

T tokens of a packed micro-batch, S cache slots, B sequences. Under context parallelism a rank has the queries, keys and
values of its own tokens of the packed row, and gathers the keys and values of all ranks.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from oreal_megatron.distributed.context_parallel import tokens_of_rank, whole_row

# Segments whose lengths are within this factor share one padded call: a trade of fewer calls for unused scores.
_LENGTH_SPREAD = 1.25


class SdpaCoreAttention(MegatronModule):
    """Causal attention within segments; used as `SelfAttentionSubmodules.core_attention`."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ):
        super().__init__(config)
        if config.attention_dropout:
            raise ValueError(f"attention_dropout {config.attention_dropout}: the local attention has no dropout")
        self.context_group = pg_collection.cp
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Returns [T, heads * dim] for packed input, otherwise [S_query, B, heads * dim].

        attention_mask: None, or bool [B, 1, S_query, S], True where attention is allowed.
        """
        if packed_seq_params is not None:
            bounds = packed_seq_params.cu_seqlens_q.tolist()
            if self.context_group.size() > 1:
                return self._packed_over_context(query, key, value, bounds)
            return self._packed(query, key, value, bounds)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        if query.size(0) == 1:
            # The queries of a group use the same cache: as rows of one query they read it once.
            rows = q.reshape(q.size(0), k.size(1), -1, q.size(3))
            out = self._sdpa(rows, k, v, attn_mask=attention_mask).reshape(q.shape)
        else:
            out = self._sdpa(q, k, v, is_causal=attention_mask is None, attn_mask=attention_mask)
        return out.permute(2, 0, 1, 3).reshape(query.size(0), query.size(1), -1)

    def _sdpa(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return F.scaled_dot_product_attention(
            q, k, v, scale=self.softmax_scale, enable_gqa=q.size(1) != k.size(1), **options
        )

    def _packed(self, query: Tensor, key: Tensor, value: Tensor, bounds: list[int]) -> Tensor:
        out = query.new_zeros(query.shape)
        for segments in _similar_lengths(bounds):
            longest = max(end - start for start, end in segments)
            if len(segments) == 1:
                (start, end), index = segments[0], None
                q, k, v = (x[start:end].transpose(0, 1).unsqueeze(0) for x in (query, key, value))
                out[start:end] = self._sdpa(q, k, v, is_causal=True)[0].transpose(0, 1)
                continue
            # Padding is on the right, so the causal mask alone keeps real positions from attending to it.
            starts = torch.tensor([start for start, _ in segments], device=query.device)
            lengths = torch.tensor([end - start for start, end in segments], device=query.device)
            offsets = torch.arange(longest, device=query.device)
            index = (starts[:, None] + offsets.minimum((lengths - 1)[:, None])).flatten()
            q, k, v = (
                x.index_select(0, index).view(len(segments), longest, *x.shape[1:]).transpose(1, 2)
                for x in (query, key, value)
            )
            real = (offsets < lengths[:, None]).flatten()
            result = self._sdpa(q, k, v, is_causal=True).transpose(1, 2).flatten(0, 1)
            out = out.index_put((index[real],), result[real])
        return out.reshape(query.size(0), -1)

    def _packed_over_context(self, query: Tensor, key: Tensor, value: Tensor, bounds: list[int]) -> Tensor:
        """Attends from this rank's two pieces of every segment: query, key, value [T / ranks, heads or groups, dim]."""
        size, rank = self.context_group.size(), self.context_group.rank()
        order = whole_row(bounds, size).to(key.device)
        # The backward pass sums the ranks' gradients of keys and values on the rank that owns them.
        key, value = (
            gather_from_sequence_parallel_region(x.contiguous(), group=self.context_group).index_select(0, order)
            for x in (key, value)
        )
        mine = tokens_of_rank(bounds, size, rank).to(key.device)
        out, first = [], 0
        for start, end in itertools.pairwise(bounds):
            length = (end - start) // (2 * size)
            for _ in range(2):
                piece = slice(first, first + length)
                # These are the segment's keys up to the last query of the piece.
                keys = torch.arange(start, int(mine[first + length - 1]) + 1, device=key.device)
                q, k, v = (
                    x.transpose(0, 1).unsqueeze(0)
                    for x in (query[piece], key[start : start + len(keys)], value[start : start + len(keys)])
                )
                out.append(self._sdpa(q, k, v, attn_mask=mine[piece, None] >= keys)[0].transpose(0, 1))
                first += length
        return torch.cat(out).reshape(query.size(0), -1)


def _similar_lengths(bounds: list[int]) -> list[list[tuple[int, int]]]:
    """Returns the non-empty segments (start, end) of a packed row, grouped by similar length, shortest first."""
    segments = sorted(
        ((start, end) for start, end in itertools.pairwise(bounds) if end > start),
        key=lambda segment: (segment[1] - segment[0], segment[0]),
    )
    batches: list[list[tuple[int, int]]] = []
    for start, end in segments:
        shortest = batches[-1][0][1] - batches[-1][0][0] if batches else 0
        if batches and end - start <= _LENGTH_SPREAD * shortest:
            batches[-1].append((start, end))
        else:
            batches.append([(start, end)])
    return batches
