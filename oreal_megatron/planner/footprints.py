"""Bytes of one rank, as models/memory_profile.py measures them and the planner adds them up."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ActivationBytes:
    """Bytes that one micro-batch needs in a part of a stage, besides the stage's parameters and buffers."""

    kept: int
    """Bytes kept between the forward and the backward pass."""
    scoring_peak: int
    """Most bytes in a forward pass without gradients."""
    training_peak: int
    """Most bytes in the forward and backward pass, `kept` included."""


@dataclass(frozen=True, kw_only=True)
class DecodedBatch:
    """Largest batch that is generated at once on the trainer's own model."""

    num_sequences: int
    prompt_tokens: int
    new_tokens: int


@dataclass(frozen=True, kw_only=True)
class RankFootprint:
    """Sizes and bytes of a rank of one pipeline stage."""

    stage: int
    num_layers: int
    policy_parameters: int
    """Elements of the policy on this rank. The reference model has as many."""
    reward_model_parameters: int
    largest_parameter: int
    """Elements of the policy's largest parameter on this rank."""
    gated_parameters: int
    """Elements of the policy's parameters that hold gate and up projection together. A checkpoint stores the two
    separately."""
    layer_kept: int
    """Bytes of a micro-batch that one layer keeps until its backward pass."""
    outside_kept: int
    """Bytes of a micro-batch that the stage keeps outside its layers."""
    layers: ActivationBytes
    """Bytes of a micro-batch in two layers."""
    head: ActivationBytes
    """Bytes of a micro-batch in the policy's log-probabilities; 0 for all stages but the last."""
    decoding_cache: int
    """Bytes of keys and values of the stage's layers while a batch is generated; 0 where servers generate."""
    decoding_running: int
    """Most other bytes of generation: of the pass that reads the prompts, or of drawing a token; 0 as above."""
