"""The model that the benchmarks run: 6.3M parameters, over a vocabulary of 4,096."""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt import GPTModel

from oreal_megatron.config import AdamWConfig, GeometryConfig, ModelConfig
from oreal_megatron.distributed.groups import ParallelGroups
from oreal_megatron.models.gpt import build_gpt
from oreal_megatron.models.trained_model import TrainedModel

VOCABULARY = 4096
GEOMETRY = GeometryConfig(num_layers=6, hidden_size=256, ffn_hidden_size=704, num_attention_heads=8, num_query_groups=2)
MODEL = ModelConfig(
    path=None,
    geometry=GEOMETRY,
    tokenizer="arithmetic",
    implementation="local",
    dtype="float32",
    max_sequence_length=1024,
)
ADAMW = AdamWConfig(
    lr=1e-5,
    min_lr=1e-6,
    warmup_steps=1,
    decay_steps=None,
    weight_decay=0.01,
    betas=(0.9, 0.999),
    eps=1e-8,
    clip_grad=1.0,
)


def built(cls: type[GPTModel], groups: ParallelGroups) -> Any:
    return build_gpt(cls, GEOMETRY, MODEL, groups, vocab_size=VOCABULARY, seed=0, tied_embeddings=False)


def trained(cls: type[GPTModel], groups: ParallelGroups) -> TrainedModel:
    return TrainedModel(built(cls, groups), ADAMW, groups, num_updates=1000)
