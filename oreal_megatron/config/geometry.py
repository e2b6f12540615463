"""The section `model.geometry`: the shape of a decoder."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from oreal_megatron.config.fields import Positive, PositiveFloat, Section


class RopeScalingConfig(Section):
    """Scaling of the rotary embeddings' frequencies, with the keys and defaults of transformers' config.json."""

    rope_type: Literal["linear", "llama3", "yarn"]
    """Rule of the scaling. linear: all frequencies are divided by factor; llama3, yarn: the low ones are."""
    factor: Annotated[float, Field(ge=1.0, allow_inf_nan=False)]
    """Ratio of the longest sequence to that of the training before the scaling."""
    original_max_position_embeddings: Positive | None = None
    """Longest sequence of the training before the scaling, in tokens. Needed by llama3 and yarn."""
    low_freq_factor: PositiveFloat | None = None
    """llama3: full turns in a sequence of the original length below which a frequency is divided."""
    high_freq_factor: PositiveFloat | None = None
    """llama3: full turns above which a frequency stays."""
    attention_factor: PositiveFloat | None = None
    """yarn: factor of queries and keys. null: from factor, mscale and mscale_all_dim."""
    beta_fast: PositiveFloat | None = None
    """yarn: full turns above which a frequency stays. null: 32."""
    beta_slow: PositiveFloat | None = None
    """yarn: full turns below which a frequency is divided. null: 1."""
    mscale: PositiveFloat | None = None
    """yarn: numerator of the attention factor. Used with mscale_all_dim only."""
    mscale_all_dim: PositiveFloat | None = None
    """yarn: denominator of the attention factor. Used with mscale only."""
    truncate: bool | None = None
    """yarn: round the bounds of the divided frequencies to whole indices. null: true."""

    @model_validator(mode="after")
    def _check_keys_of_type(self) -> RopeScalingConfig:
        needed = {
            "linear": set(),
            "llama3": {"original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
            "yarn": {"original_max_position_embeddings"},
        }[self.rope_type]
        yarn = {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}
        given = set(self.parameters) - {"rope_type", "factor"}
        if missing := sorted(needed - given):
            raise ValueError(f"rope_type {self.rope_type} needs {', '.join(missing)}; set them")
        if others := sorted(given - needed - (yarn if self.rope_type == "yarn" else set())):
            raise ValueError(f"rope_type {self.rope_type} has no {', '.join(others)}; remove them")
        return self

    @property
    def parameters(self) -> dict[str, str | float | bool]:
        """Keys that are given, as config.json has them."""
        return self.model_dump(exclude_none=True)


class GeometryConfig(Section):
    """Shape of a decoder-only transformer with RMSNorm, SwiGLU, rotary embeddings and grouped-query attention."""

    num_layers: Positive
    """Number of transformer layers."""
    hidden_size: Positive
    """Width of the residual stream."""
    ffn_hidden_size: Positive
    """Width of the feed-forward layers, of the gate and of the up projection each."""
    num_attention_heads: Positive
    """Number of query heads."""
    num_query_groups: Positive
    """Number of key-value heads. Must divide num_attention_heads."""
    head_dim: Positive | None = None
    """Dimension of one attention head. null: hidden_size / num_attention_heads."""
    vocab_size: Positive | None = None
    """Rows of the embedding, before padding for tensor parallelism. Token ids beyond them are refused and never
    generated. null: the tokenizer's number of tokens."""
    rope_theta: PositiveFloat = 10000.0
    """Base of the rotary embeddings' frequencies."""
    rope_scaling: RopeScalingConfig | None = None
    """Scaling of these frequencies. null: none."""
    norm_eps: PositiveFloat = 1e-6
    """Epsilon of RMSNorm."""
    qkv_bias: bool = True
    """Biases on the query, key and value projections, as in Qwen2."""
    qk_norm: bool = False
    """RMSNorm on the queries and keys of each head, as in Qwen3."""
    tied_embeddings: bool = False
    """Use the embedding as the output layer too."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of random initial weights. Unused where weights are loaded."""

    @property
    def attention_head_dim(self) -> int:
        """Dimension of one attention head: head_dim, or hidden_size / num_attention_heads where it is null."""
        return self.head_dim or self.hidden_size // self.num_attention_heads
