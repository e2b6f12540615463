"""Tiny transformers models of both families, and the same weights in Megatron-Core."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from oreal_megatron.config import ModelConfig
from oreal_megatron.convert.huggingface import geometry_of
from oreal_megatron.convert.module import load_weights
from oreal_megatron.models.architecture import build_gpt
from oreal_megatron.models.policy import Policy

VOCABULARY = 120


def save_tiny(directory: Path, family: str, *, tied: bool) -> Path:
    """A random two-layer model of the family, every bias non-zero, saved as transformers does."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    config_class, model_class = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    }[family]
    config = config_class(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    model = model_class(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(directory)
    return directory


def as_policy(directory: Path, groups: Any) -> Policy:
    geometry = geometry_of(directory)
    model = ModelConfig(
        path=str(directory),
        geometry=None,
        tokenizer="unused",
        implementation="local",
        dtype="float32",
        max_sequence_length=128,
    )
    policy = build_gpt(
        Policy,
        geometry,
        model,
        groups,
        vocab_size=VOCABULARY,
        seed=0,
        tied_embeddings=geometry.tied_embeddings,
    )
    load_weights(policy, directory, groups)
    return policy


@pytest.fixture(scope="session", params=[("llama", True), ("qwen2", False)], ids=["llama-tied", "qwen2-untied"])
def pair(request, tmp_path_factory, single_process) -> tuple[Any, Policy]:
    """(transformers model, Policy) with the same weights."""
    from transformers import AutoModelForCausalLM

    family, tied = request.param
    directory = save_tiny(tmp_path_factory.mktemp("hf") / family, family, tied=tied)
    return AutoModelForCausalLM.from_pretrained(directory).eval(), as_policy(directory, single_process)
