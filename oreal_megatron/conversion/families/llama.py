"""Llama 2 and 3, R1-Distill-Llama, SmolLM2: the common decoder without additions."""

from __future__ import annotations

from oreal_megatron.conversion.families.decoder import Family

FAMILY = Family(
    name="llama",
    architectures={"causal": "LlamaForCausalLM", "scalar": "LlamaForTokenClassification"},
    only={"attention_bias": False, "mlp_bias": False, "hidden_act": "silu"},
)
