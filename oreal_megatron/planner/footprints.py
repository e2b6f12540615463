"""What one rank holds and computes with: records that models/memory_profile.py measures and the planner adds up."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ActivationBytes:
    """Bytes of one micro-batch's way through a part of a stage, above the stage's parameters and buffers."""

    kept: int
    """Between its forward and its backward pass."""
    scoring_peak: int
    """At most, in a forward pass without gradients."""
    training_peak: int
    """At most, in its forward and backward pass, with what it keeps."""


@dataclass(frozen=True, kw_only=True)
class DecodedBatch:
    """The largest batch that is generated at once on the trainer's own model."""

    num_sequences: int
    prompt_tokens: int
    new_tokens: int


@dataclass(frozen=True)
class DecodingBytes:
    """Bytes of generating such a batch on a stage, above the stage's parameters and buffers."""

    cache: int
    """Keys and values of all layers."""
    running: int
    """At most beside them: of the pass that reads the prompts, or of drawing a token."""


@dataclass(frozen=True, kw_only=True)
class RankFootprint:
    """What a rank of one pipeline stage holds and computes with."""

    stage: int
    num_layers: int
    policy_parameters: int
    """Elements of this rank; the reference's are as many."""
    reward_model_parameters: int
    largest_parameter: int
    """Elements of the policy's largest one."""
    gated_parameters: int
    """Elements of the policy's that hold two matrices, gate and up, which a checkpoint has apart."""
    layer_kept: int
    """Bytes that a layer keeps of a micro-batch until its backward pass."""
    outside_kept: int
    """Bytes that the stage keeps of it beside its layers."""
    layers: ActivationBytes
    """Through two layers."""
    head: ActivationBytes
    """Through the policy's log-probabilities; nothing where the stage is not the last."""
    decoding: DecodingBytes | None
    """None where servers generate."""
