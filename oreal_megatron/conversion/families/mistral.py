"""Mistral without a sliding window (v0.2 on): the decoder of Llama under its own name."""

from __future__ import annotations

from oreal_megatron.conversion.families.decoder import Family

FAMILY = Family(
    name="mistral",
    architectures={"causal": "MistralForCausalLM", "scalar": "MistralForTokenClassification"},
    only={"sliding_window": None, "hidden_act": "silu"},
    absent={"sliding_window": 4096},
)
