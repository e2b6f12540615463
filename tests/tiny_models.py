"""Tiny models: one from scratch, and of every supported family one that transformers saves, or Megatron-Core has."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from oreal_megatron.config import GeometryConfig, ModelConfig
from oreal_megatron.conversion.huggingface import geometry_of
from oreal_megatron.conversion.module import load_weights
from oreal_megatron.distributed.cpu_backend import device
from oreal_megatron.models.policy import Policy, build_policy
from oreal_megatron.models.virtual_stages import chunks_of

GEOMETRY = GeometryConfig(num_layers=2, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4, num_query_groups=2)
MODEL = ModelConfig(
    path=None, geometry=GEOMETRY, tokenizer="arithmetic", implementation="local", dtype="float32",
    max_sequence_length=64,
)  # fmt: skip
"""From random weights; over the 105 tokens of the arithmetic tokenizer."""

VOCABULARY = 120
FAMILIES = ("llama", "qwen2", "qwen3")
LOGPROB_ROUNDING = 5e-5
"""Nats by which two float32 implementations of these models may differ in a log-probability: several times what was
seen, as kernels, and with them the rounding, are those of the CPU; wrong weights or masks differ by far more."""


def save_tiny(
    directory: Path,
    family: str,
    *,
    tied: bool,
    dtype: torch.dtype = torch.float32,
    head: Literal["causal", "scalar"] = "causal",
    vocabulary: int = VOCABULARY,
    num_layers: int = 2,
    num_heads: int = 4,
    num_groups: int = 2,
    ffn: int = 96,
    max_shard_size: str = "5GB",
    seed: int = 0,
    **more: Any,
) -> Path:
    """A random model, every bias and norm away from its initial value; head dimension 16, which 4 heads do not fill."""
    import transformers

    name = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family]
    config = getattr(transformers, f"{name}Config")(
        vocab_size=vocabulary,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_groups,
        tie_word_embeddings=tied,
        **({"num_labels": 1} if head == "scalar" else {}),
        **(
            {"max_position_embeddings": 256, "hidden_size": 48, "intermediate_size": ffn, "initializer_range": 0.2}
            | ({"head_dim": 16} if family != "qwen2" else {})
            | more
        ),
    )
    kind = {"causal": "ForCausalLM", "scalar": "ForTokenClassification"}[head]
    torch.manual_seed(seed)
    model = getattr(transformers, name + kind)(config).to(dtype)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias") or "norm" in parameter_name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    return directory


def policy_chunks(directory: Path, groups: Any, *, max_sequence_length: int = 128) -> list[Any]:
    """The model of a Hugging Face directory in Megatron-Core: this rank's model chunks."""
    geometry = geometry_of(directory)
    assert geometry.vocab_size is not None
    model = ModelConfig(
        path=str(directory),
        geometry=None,
        tokenizer="unused",
        implementation="local",
        dtype="float32",
        max_sequence_length=max_sequence_length,
    )
    policy = build_policy(geometry, model, groups, vocab_size=geometry.vocab_size, seed=0)
    chunks = [chunk.to(device()) for chunk in chunks_of(policy)]
    for chunk in chunks:
        load_weights(chunk, directory, groups)
    return chunks


def as_policy(directory: Path, groups: Any, *, max_sequence_length: int = 128) -> Policy:
    """The model of a Hugging Face directory where a stage is one model chunk."""
    (policy,) = policy_chunks(directory, groups, max_sequence_length=max_sequence_length)
    assert isinstance(policy, Policy)
    return policy
