"""The model that the benchmarks run: 6.3M parameters, over a vocabulary of 4,096."""

from __future__ import annotations

from megatron.core.models.gpt import GPTModel

from oreal_megatron.config import AdamWConfig, GeometryConfig, ModelConfig
from oreal_megatron.distributed.groups import ParallelGroups
from oreal_megatron.models.gpt import build_gpt
from oreal_megatron.models.policy import Policy, build_policy
from oreal_megatron.models.reward_model import TokenRewardModel, build_reward_model
from oreal_megatron.models.trained_model import TrainedModel
from oreal_megatron.models.virtual_stages import ModelChunks

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


def policy_of(groups: ParallelGroups) -> Policy | ModelChunks:
    """Builds the policy with random weights."""
    return build_policy(GEOMETRY, MODEL, groups, vocab_size=VOCABULARY, seed=0)


def reward_model_of(groups: ParallelGroups) -> TokenRewardModel | ModelChunks:
    """Builds the reward model with random weights and a head of zeros."""
    return build_reward_model(GEOMETRY, MODEL, groups, vocab_size=VOCABULARY, seed=0)


def bare_model_of(groups: ParallelGroups) -> GPTModel | ModelChunks:
    """Builds Megatron-Core's own model, with its stock cross-entropy."""
    return build_gpt(GPTModel, GEOMETRY, MODEL, groups, vocab_size=VOCABULARY, seed=0, tied_embeddings=False)


def trained(module: GPTModel | ModelChunks, groups: ParallelGroups) -> TrainedModel:
    """Adds an optimizer and a schedule to a model."""
    return TrainedModel(module, ADAMW, groups, num_updates=1000)
