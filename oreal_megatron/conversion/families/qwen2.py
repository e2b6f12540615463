"""Qwen2, Qwen2.5, OREAL-7B and -32B, R1-Distill-Qwen: biases on queries, keys and values."""

from __future__ import annotations

from oreal_megatron.conversion.families.decoder import ATTENTION, HF_ATTENTION, Family
from oreal_megatron.conversion.rules import GroupedQKV

FAMILY = Family(
    name="qwen2",
    architectures={"causal": "Qwen2ForCausalLM", "scalar": "Qwen2ForTokenClassification"},
    qkv_bias=True,
    extra_layer_rules=(
        GroupedQKV(
            ATTENTION + "linear_qkv.bias",
            HF_ATTENTION + "q_proj.bias",
            HF_ATTENTION + "k_proj.bias",
            HF_ATTENTION + "v_proj.bias",
            columns=(),
        ),
    ),
    only={"use_sliding_window": False, "hidden_act": "silu"},
)
