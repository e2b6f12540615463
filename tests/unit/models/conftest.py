"""Tiny transformers models of every family, and the same weights in Megatron-Core."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from oreal_megatron.config import ModelConfig
from oreal_megatron.convert.huggingface import geometry_of
from oreal_megatron.convert.module import load_weights
from oreal_megatron.models.architecture import build_gpt
from oreal_megatron.models.policy import Policy
from tests.tiny_models import save_tiny


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
        vocab_size=geometry.vocab_size,
        seed=0,
        tied_embeddings=geometry.tied_embeddings,
    )
    load_weights(policy, directory, groups)
    return policy


@pytest.fixture(scope="session", params=[("llama", True), ("qwen2", False), ("qwen3", True)], ids=lambda p: p[0])
def pair(request, tmp_path_factory, single_process) -> tuple[Any, Policy]:
    """(transformers model, Policy) with the same weights."""
    from transformers import AutoModelForCausalLM

    family, tied = request.param
    directory = save_tiny(tmp_path_factory.mktemp("hf") / family, family, tied=tied)
    return AutoModelForCausalLM.from_pretrained(directory).eval(), as_policy(directory, single_process)
