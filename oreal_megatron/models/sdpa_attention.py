"""Core attention of the local layer spec with torch's scaled_dot_product_attention.

Megatron-Core's own DotProductAttention materializes the score matrix and refuses packed sequences. The class here
accepts the three kinds of input of this package:

    packed    q [T, heads, dim], k/v [T, groups, dim], segments in PackedRow         training and scoring
    prefill   q [S, B, heads, dim], k/v [S, B, groups, dim], left padding in the mask  generation, prompts
    decode    q [1, B, heads, dim], k/v [S, B, groups, dim]                            generation, next tokens

T tokens of a packed micro-batch, S cache slots, B sequences. Under context parallelism a rank has the queries, keys and
values of its own tokens of the packed row, and gathers the keys and values of all ranks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from oreal_megatron.distributed.context_parallel import tokens_of_rank, whole_row
from oreal_megatron.models.packed_row import AttentionCall, PackedRow


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
        packed_seq_params: PackedRow | None = None,
    ) -> Tensor:
        """Returns [T, heads * dim] for packed input, otherwise [S_query, B, heads * dim].

        attention_mask: None, or bool [B, 1, S_query, S], True where attention is allowed.
        """
        if packed_seq_params is not None:
            if self.context_group.size() > 1:
                return self._packed_over_context(query, key, value, packed_seq_params.cu_seqlens_q.tolist())
            return self._packed(query, key, value, packed_seq_params.calls)
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

    def _packed(self, query: Tensor, key: Tensor, value: Tensor, calls: Sequence[AttentionCall | slice]) -> Tensor:
        out = query.new_zeros(query.shape)
        for call in calls:
            if isinstance(call, slice):
                q, k, v = (x[call].transpose(0, 1).unsqueeze(0) for x in (query, key, value))
                out[call] = self._sdpa(q, k, v, is_causal=True)[0].transpose(0, 1)
                continue
            q, k, v = (
                x.index_select(0, tokens).view(call.num_segments, -1, *x.shape[1:]).transpose(1, 2)
                for x, tokens in ((query, call.queries), (key, call.keys), (value, call.keys))
            )
            result = self._sdpa(q, k, v, attn_mask=call.mask, is_causal=call.mask is None)
            out = out.index_put((call.tokens,), result.transpose(1, 2).flatten(0, 1)[call.real])
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
