"""Qwen3, dense models: queries and keys of each head are normalised."""

from __future__ import annotations

from oreal_megatron.conversion.families.decoder import ATTENTION, HF_ATTENTION, Family
from oreal_megatron.conversion.rules import Same

FAMILY = Family(
    name="qwen3",
    architectures={"causal": "Qwen3ForCausalLM", "scalar": "Qwen3ForTokenClassification"},
    qk_norm=True,
    extra_layer_rules=tuple(
        Same(ATTENTION + f"{letter}_layernorm.weight", HF_ATTENTION + f"{letter}_norm.weight", ["head_dim"])
        for letter in "qk"
    ),
    only={"attention_bias": False, "use_sliding_window": False, "hidden_act": "silu"},
)
