"""Self-attention of the local layer spec, which rotates every query and key once.

Megatron-Core's own self-attention cuts a packed row into its sequences to find their angles, in every layer for queries
and keys, and in generation it rotates the whole KV cache again for each token. Here a packed row is rotated as a whole,
by the positions of its tokens, and the cache holds rotated keys. The numbers are the same, bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from oreal_megatron.models.packed_row import PackedRow


class LocalSelfAttention(SelfAttention):
    """Self-attention with rotary embeddings for the rows of SdpaCoreAttention: packed, prefill and decode."""

    _cos_sin: tuple[Tensor, Tensor]

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        *,
        rotary_pos_emb: Tensor,
        inference_context: StaticInferenceContext | None = None,
        packed_seq_params: PackedRow | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attends. rotary_pos_emb: angles of positions from 0 on, fp32 [S, 1, 1, dim]; see the base class."""
        angles = rotary_pos_emb
        if packed_seq_params is not None:
            assert packed_seq_params.positions is not None
            angles = angles.index_select(0, packed_seq_params.positions)
        elif inference_context is not None:
            start = inference_context.sequence_len_offset
            angles = angles[start : start + hidden_states.size(0)]
        self._cos_sin = angles.cos().to(hidden_states.dtype), angles.sin().to(hidden_states.dtype)
        output: tuple[Tensor, Tensor | None] = super().forward(
            hidden_states,
            attention_mask,
            inference_context=inference_context,
            packed_seq_params=packed_seq_params,
            **options,
        )
        del self._cos_sin  # not kept for a backward pass that recomputes
        return output

    def get_query_key_value_tensors(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Returns rotated queries [S, B, heads, dim], rotated keys and values [S, B, groups, dim]."""
        query, key, value = super().get_query_key_value_tensors(*args, **options)
        return self._rotated(query), self._rotated(key), value

    def _rotated(self, x: Tensor) -> Tensor:
        cos, sin = self._cos_sin
        left, right = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-right, left), dim=-1) * sin
