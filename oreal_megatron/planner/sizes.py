"""Sizes that plans are made of: parameters, their bytes, tokens of a row, rollouts of a step."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from oreal_megatron.config import GeometryConfig, TrainConfig


@dataclass(frozen=True)
class Sizes:
    """Layout and precision of a configuration in numbers."""

    config: TrainConfig
    geometry: GeometryConfig
    num_devices: int
    """Number of trainer processes."""

    @property
    def data(self) -> int:
        """Data-parallel replicas."""
        p = self.config.parallel
        return self.num_devices // (p.tensor * p.pipeline * p.context)

    @property
    def element(self) -> int:
        """Bytes of a weight."""
        return 2 if self.config.model.dtype == "bfloat16" else 4

    def weight_bytes(self, model: str) -> float:
        """Returns the mean bytes of a weight of `model` on a device.

        model: name in the section `fp8`. Transformer Engine keeps FP8 copies of linear layers' weights between
        micro-batches, besides the bf16 weights or instead of them (`parameters`), and transposed copies too for a model
        that trains. With `parallel.offload` it makes the copies again each time.
        """
        fp8 = self.config.fp8.models.get(model)
        if fp8 is None or self.config.parallel.offload:
            return self.element
        in_fp8 = (1 if model == "reference" else 2) + (0 if fp8.parameters else self.element)
        share = self.fp8_share(model)
        return share * in_fp8 + (1 - share) * self.element

    def fp8_share(self, model: str) -> float:
        """Returns the share of `model`'s weights whose matrix products are in FP8."""
        fp8 = self.config.fp8.models.get(model)
        if fp8 is None:
            return 0.0
        layers = max(self.geometry.num_layers - fp8.bf16_first_layers - fp8.bf16_last_layers, 0)
        return layers * linear_parameters(self.geometry) / num_parameters(self.geometry)

    @property
    def replicas(self) -> int:
        """Ranks that hold the same weights, over data and context parallelism."""
        return self.data * self.config.parallel.context

    @property
    def optimizer_whole(self) -> int:
        """Bytes of a weight's optimizer state: Adam's two moments, and an fp32 weight where the trained one is bf16."""
        return 12 if self.config.model.dtype == "bfloat16" else 8

    @property
    def optimizer_element(self) -> float:
        """Bytes of optimizer state for a weight on one device."""
        return self.optimizer_whole / (self.replicas if self.config.parallel.distributed_optimizer else 1)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values of one token in all layers, unsplit."""
        g = self.geometry
        head_dim = g.attention_head_dim
        return 2 * g.num_layers * g.num_query_groups * head_dim * self.element


def rollouts_per_step(config: TrainConfig) -> int:
    """Returns the most rollouts that a step generates, rollout.long_tail.oversample included."""
    return config.num_asked_prompts * config.rollout.samples_per_prompt


def linear_parameters(g: GeometryConfig) -> int:
    """Returns the number of weights in the linear layers of one transformer layer."""
    head_dim = g.attention_head_dim
    attention = (2 * g.num_attention_heads + 2 * g.num_query_groups) * head_dim * g.hidden_size
    return attention + 3 * g.hidden_size * g.ffn_hidden_size


def num_parameters(g: GeometryConfig) -> int:
    """Returns the number of parameters of the unsplit model, for estimates without modules: servers, FLOPs, disk."""
    head_dim = g.attention_head_dim
    heads = (g.num_attention_heads + 2 * g.num_query_groups) * head_dim
    layer = linear_parameters(g) + heads * g.qkv_bias + 2 * g.hidden_size
    vocabulary = (g.vocab_size or 0) * g.hidden_size
    return g.num_layers * layer + g.hidden_size + vocabulary * (1 if g.tied_embeddings else 2)


def row_tokens(config: TrainConfig) -> int:
    """Returns the tokens of the longest packed row: micro_batch_tokens or the longest sequence, rounded up to split."""
    p = config.parallel
    multiple = 2 * p.context * (p.tensor if p.sequence else 1)
    longest = max(p.micro_batch_tokens, config.model.max_sequence_length)
    return ceil(longest / multiple) * multiple
