"""Tiny transformers models of every family, and the same weights in Megatron-Core."""

from __future__ import annotations

from typing import Any

import pytest

from oreal_megatron.models.policy import Policy
from tests.tiny_models import as_policy, save_tiny


@pytest.fixture(scope="session", params=[("llama", True), ("qwen2", False), ("qwen3", True)], ids=lambda p: p[0])
def pair(request: Any, tmp_path_factory: Any, single_process: Any) -> tuple[Any, Policy]:
    """(transformers model, Policy) with the same weights."""
    from transformers import AutoModelForCausalLM

    family, tied = request.param
    directory = save_tiny(tmp_path_factory.mktemp("hf") / family, family, tied=tied)
    return AutoModelForCausalLM.from_pretrained(directory).eval(), as_policy(directory, single_process)
