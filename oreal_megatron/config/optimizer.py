"""Sections of the optimizers."""

from __future__ import annotations

from typing import Annotated, Literal

from oreal_megatron.config.fields import (
    AsTuple,
    Decay,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Section,
)


class AdamWConfig(Section):
    """AdamW, gradient clipping, and a learning rate with linear warm-up and decay, for one model."""

    lr: PositiveFloat
    """Largest learning rate, reached at the end of the warm-up."""
    min_lr: NonNegativeFloat
    """Learning rate at the end of the decay."""
    warmup_steps: NonNegative
    """Number of updates in which the learning rate rises to lr."""
    decay_steps: Positive | None
    """Number of updates after which the learning rate is min_lr. null: as many as there are."""
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate from lr to min_lr. constant: it stays at lr, and min_lr is not read."""
    weight_decay: NonNegativeFloat
    """Decoupled weight decay."""
    betas: Annotated[tuple[Decay, Decay], AsTuple]
    """Exponential decay rates of Adam's two moments."""
    eps: PositiveFloat
    """Number added to Adam's denominator."""
    clip_grad: PositiveFloat
    """Largest norm of the gradient; a larger gradient is scaled down to it."""


class OptimizerConfig(Section):
    """Optimizers of the trained models."""

    policy: AdamWConfig
    """Optimizer of the policy."""
    reward_model: AdamWConfig
    """Optimizer of the reward model."""
