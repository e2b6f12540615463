"""A policy of a tiny Hugging Face model, and sequences for it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from oreal_megatron.config import Fp8ModelConfig, GeometryConfig, ModelConfig
from oreal_megatron.conversion.module import load_weights
from oreal_megatron.data.packing import PackedSequence
from oreal_megatron.distributed.groups import ParallelGroups
from oreal_megatron.models.policy import Policy, build_policy

CPU = torch.device("cpu")
SEQUENCES = [
    PackedSequence(str(i), tuple(range(1, 4)), tuple((7 * i + 3 * j) % 97 for j in range(4 + 9 * i))) for i in range(4)
]


def tiny_policy(
    geometry: GeometryConfig,
    groups: ParallelGroups,
    implementation: str,
    fp8: Fp8ModelConfig | None = None,
    *,
    load: Path | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> Policy:
    model = ModelConfig(
        path=None, geometry=geometry, tokenizer="unused", implementation=implementation, dtype=dtype,
        max_sequence_length=64,
    )  # fmt: skip
    assert geometry.vocab_size is not None
    policy = build_policy(geometry, model, groups, vocab_size=geometry.vocab_size, seed=None, fp8=fp8)
    assert isinstance(policy, Policy)
    if load is not None:
        load_weights(policy, load, groups)
    return policy
