"""The decoder that all families share: RMSNorm, grouped-query attention with RoPE, and SwiGLU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from oreal_megatron.config import GeometryConfig
from oreal_megatron.conversion.rules import GroupedQKV, Rule, Same, Split, Stacked, Table, build_table

Head = Literal["causal", "scalar"]
"""The part after the decoder: the output layer of a language model, or the score of a reward model."""

LAYER = "decoder.layers.{layer}."
ATTENTION = LAYER + "self_attention."
HF_LAYER = "model.layers.{layer}."
HF_ATTENTION = HF_LAYER + "self_attn."

EMBEDDING = Same("embedding.word_embeddings.weight", "model.embed_tokens.weight", ["vocabulary", "hidden"], Split.ROWS)
# Megatron's names are those of its distributed checkpoints, where a norm belongs to the linear layer after it, as in
# Transformer Engine's fused layers. naming.py has the names of modules.
LAYERS: tuple[Rule, ...] = (
    Same(ATTENTION + "linear_qkv.layer_norm_weight", HF_LAYER + "input_layernorm.weight", ["hidden"]),
    GroupedQKV(
        ATTENTION + "linear_qkv.weight",
        HF_ATTENTION + "q_proj.weight",
        HF_ATTENTION + "k_proj.weight",
        HF_ATTENTION + "v_proj.weight",
    ),
    Same(ATTENTION + "linear_proj.weight", HF_ATTENTION + "o_proj.weight", ["hidden", "queries"], Split.COLUMNS),
    Same(LAYER + "mlp.linear_fc1.layer_norm_weight", HF_LAYER + "post_attention_layernorm.weight", ["hidden"]),
    Stacked(LAYER + "mlp.linear_fc1.weight", HF_LAYER + "mlp.gate_proj.weight", HF_LAYER + "mlp.up_proj.weight"),
    Same(LAYER + "mlp.linear_fc2.weight", HF_LAYER + "mlp.down_proj.weight", ["hidden", "ffn"], Split.COLUMNS),
)
FINAL_NORM = Same("decoder.final_layernorm.weight", "model.norm.weight", ["hidden"])
HEADS: Mapping[Head, tuple[Rule, ...]] = {
    "causal": (Same("output_layer.weight", "lm_head.weight", ["vocabulary", "hidden"], Split.ROWS, tied_to=EMBEDDING),),
    "scalar": (
        Same("output_layer.weight", "score.weight", ["score", "hidden"]),
        Same("output_layer.bias", "score.bias", ["score"]),
    ),
}


@dataclass(frozen=True)
class Family:
    """A family of models: its names, its additions to the common layers, and restrictions of its config.json."""

    name: str
    """`model_type` in config.json."""
    architectures: Mapping[Head, str]
    """`architectures` in config.json, by head."""
    qkv_bias: bool = False
    qk_norm: bool = False
    extra_layer_rules: tuple[Rule, ...] = ()
    only: Mapping[str, Any] = field(default_factory=dict)
    """Keys of config.json with their only supported value."""
    absent: Mapping[str, Any] = field(default_factory=dict)
    """Values that transformers gives to keys of `only` that are absent, where they are others."""

    def table(self, geometry: GeometryConfig, head: Head) -> Table:
        """Builds the conversion table of a model."""
        if head == "scalar":
            geometry = geometry.model_copy(update={"tied_embeddings": False})
        return build_table([EMBEDDING, *LAYERS, *self.extra_layer_rules, FINAL_NORM, *HEADS[head]], geometry)
