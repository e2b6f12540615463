"""Builds Megatron-Core's TransformerConfig, layer spec and GPTModel from a model's geometry."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from megatron.core.extensions.transformer_engine import HAVE_TE, TEDotProductAttention
from megatron.core.fp8_utils import TE_LINEAR_TYPES, get_fp8_context, is_first_last_bf16_layer
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from oreal_megatron.config import Fp8ModelConfig, GeometryConfig, ModelConfig
from oreal_megatron.distributed.cpu_backend import device
from oreal_megatron.distributed.groups import ParallelGroups
from oreal_megatron.models.initialization import draw_weights
from oreal_megatron.models.local_attention import LocalSelfAttention
from oreal_megatron.models.sdpa_attention import SdpaCoreAttention
from oreal_megatron.models.virtual_stages import ModelChunks

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

M = TypeVar("M", bound=GPTModel)


class LocalRMSNorm(torch.nn.RMSNorm):
    """RMSNorm of torch with the attribute that sums its gradient over tensor ranks under sequence parallelism.

    Megatron-Core's WrappedTorchNorm refuses sequence parallelism.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def transformer_config(
    geometry: GeometryConfig, model: ModelConfig, groups: ParallelGroups, fp8: Fp8ModelConfig | None = None
) -> TransformerConfig:
    """Returns Megatron-Core's configuration of a dense decoder: RMSNorm, SwiGLU, RoPE, grouped queries, no dropout.

    Raises:
        ValueError: Transformer Engine is asked for and does not import.
    """
    if model.implementation == "transformer_engine" and not HAVE_TE:
        raise ValueError(
            "model.implementation = transformer_engine, but Transformer Engine does not import here. Install what "
            "`oreal-doctor` names, or set model.implementation=local."
        )
    dtype = DTYPES[model.dtype]
    layout = groups.layout
    _, attention_factor = scaled_rope(geometry)
    transformer_engine = model.implementation == "transformer_engine"
    return TransformerConfig(
        num_layers=geometry.num_layers,
        hidden_size=geometry.hidden_size,
        ffn_hidden_size=geometry.ffn_hidden_size,
        num_attention_heads=geometry.num_attention_heads,
        num_query_groups=geometry.num_query_groups,
        kv_channels=geometry.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=geometry.norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=geometry.qkv_bias,
        qk_layernorm=geometry.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=groups.tensor_size,
        sequence_parallel=layout.sequence,
        context_parallel_size=groups.context_size,
        pipeline_model_parallel_size=groups.pipeline_size,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
        # With two interleaved stages, the previous and the next stage are the same rank: batched transfers of both
        # directions would receive each other's tensors, and gradients would be wrong without an error.
        overlap_p2p_comm=layout.virtual_pipeline > 1,
        batch_p2p_comm=layout.virtual_pipeline == 1,
        **_recompute_fields(layout.recompute, transformer_engine),
        **fp8_fields(fp8, offload=layout.offload),
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        attention_softmax_in_fp32=True,
        # The rotary embeddings multiply queries and keys by the attention factor. Here it holds for fused ones too.
        softmax_scale=attention_factor**2 / math.sqrt(geometry.attention_head_dim) if attention_factor != 1.0 else None,
        # Losses are divided by global counts before the backward pass; gradients are plain sums.
        calculate_per_token_loss=True,
        # Packed micro-batches differ in length; the dispatcher's name is checked even without experts.
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        use_cpu_initialization=not transformer_engine,
        # `draw_weights` initializes. With perform_initialization=False Megatron-Core would not mark split parameters.
        init_method=torch.nn.Identity(),
        output_layer_init_method=torch.nn.Identity(),
        embedding_init_method=torch.nn.Identity(),
        gradient_accumulation_fusion=layout.fused_weight_gradients,
        masked_softmax_fusion=False,
        bias_activation_fusion=transformer_engine,
        bias_dropout_fusion=transformer_engine,
        apply_rope_fusion=transformer_engine,
    )


def scaled_rope(geometry: GeometryConfig) -> tuple[Tensor | None, float]:
    """Returns scaled inverse frequencies, fp32 [head_dim / 2], and the attention factor, both by transformers.

    Without a scaling they are None and 1: Megatron-Core's own frequencies hold.
    """
    scaling = geometry.rope_scaling
    if scaling is None:
        return None, 1.0
    original = scaling.original_max_position_embeddings or 1
    config = LlamaConfig(
        hidden_size=geometry.hidden_size,
        num_attention_heads=geometry.num_attention_heads,
        head_dim=geometry.attention_head_dim,
        max_position_embeddings=math.ceil(scaling.factor * original),  # read for warnings only
        rope_parameters={"rope_theta": geometry.rope_theta, **scaling.parameters},
    )
    return ROPE_INIT_FUNCTIONS[scaling.rope_type](config, torch.device("cpu"))


def _recompute_fields(recompute: str, transformer_engine: bool) -> dict[str, Any]:
    if recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if recompute == "selective":
        # Fused attention keeps no scores: recomputing it would save no memory.
        modules = ["mlp"] if transformer_engine else ["core_attn", "mlp"]
        return {"recompute_granularity": "selective", "recompute_modules": modules}
    return {}


def fp8_fields(fp8: Fp8ModelConfig | None, *, offload: bool) -> dict[str, Any]:
    """Returns the fields of TransformerConfig that ask for FP8."""
    if fp8 is None:
        return {}
    return {
        "fp8": fp8.format,
        "fp8_recipe": fp8.recipe,
        "fp8_param": fp8.parameters,
        "first_last_layers_bf16": bool(fp8.bf16_first_layers or fp8.bf16_last_layers),
        "num_layers_at_start_in_bf16": fp8.bf16_first_layers,
        "num_layers_at_end_in_bf16": fp8.bf16_last_layers,
        "fp8_amax_history_len": fp8.amax_history or 1,
        "fp8_amax_compute_algo": "max",
        # Delayed scaling reduces the largest values at the end of every pass. Data-parallel ranks make different
        # numbers of passes and would wait for each other for ever; tensor and context ranks make the same number.
        "tp_only_amax_red": True,
        # The cached FP8 copies of the weights would stay on the device when the weights are offloaded.
        "disable_parameter_transpose_cache": offload,
    }


def layer_spec(
    config: TransformerConfig, implementation: str, chunk: int | None
) -> ModuleSpec | TransformerBlockSubmodules:
    """Returns the layers of a model chunk: Transformer Engine's, or Megatron-Core's local layers with SDPA and RMSNorm.

    chunk: index of the model chunk in its stage under the interleaved schedule, otherwise None.
    """
    if implementation == "transformer_engine":
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    layer.submodules.input_layernorm = LocalRMSNorm
    layer.submodules.pre_mlp_layernorm = LocalRMSNorm
    layer.submodules.self_attention.module = LocalSelfAttention
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = SdpaCoreAttention
    attention.q_layernorm = attention.k_layernorm = LocalRMSNorm if config.qk_layernorm else IdentityOp
    # The submodules of the block, and not of the layer alone, include the final norm.
    num_layers = get_num_layers_to_build(config, vp_stage=chunk)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=LocalRMSNorm)


def check_layers(module: GPTModel, implementation: str) -> None:
    """Checks that every layer has the classes and the precision that were asked for, which Megatron-Core does not.

    Raises:
        RuntimeError: a layer is of another class, or computes in another precision.
    """
    config = module.config
    linear: tuple[type, ...] = TE_LINEAR_TYPES
    if implementation == "local":
        linear = (ColumnParallelLinear, RowParallelLinear)
    for layer in module.decoder.layers:
        number = layer.layer_number - 1
        attention, mlp = layer.self_attention, layer.mlp
        for part in (attention.linear_qkv, attention.linear_proj, mlp.linear_fc1, mlp.linear_fc2):
            if not isinstance(part, linear):
                raise RuntimeError(
                    f"layer {number} has a {type(part).__name__} where model.implementation = {implementation}"
                )
        if implementation == "transformer_engine" and not isinstance(attention.core_attention, TEDotProductAttention):
            raise RuntimeError(f"layer {number} has {type(attention.core_attention).__name__} for attention")
        wanted = bool(config.fp8) and not is_first_last_bf16_layer(config, number)
        if wanted == isinstance(get_fp8_context(config, number), contextlib.nullcontext):
            raise RuntimeError(
                f"layer {number} {'does not compute' if wanted else 'computes'} in FP8: Megatron-Core finds "
                f"{'no' if wanted else 'a'} context for recipe {config.fp8_recipe}"
            )


def padded_vocab_size(vocab_size: int, groups: ParallelGroups) -> int:
    """Returns the rows of embedding and output layer: vocab_size up to the next multiple of the tensor ranks."""
    return -(-vocab_size // groups.tensor_size) * groups.tensor_size


def build_gpt(
    make: Callable[..., M],
    geometry: GeometryConfig,
    model: ModelConfig,
    groups: ParallelGroups,
    *,
    vocab_size: int,
    seed: int | None,
    tied_embeddings: bool,
    fp8: Fp8ModelConfig | None = None,
) -> M | ModelChunks:
    """Builds this rank's part of a decoder on its device, with weights drawn from `seed` alone, whatever the layout.

    Args:
        make: a subclass of GPTModel, with `functools.partial` around it where it has arguments of its own.
        vocab_size: tokens of the vocabulary, without rows of padding.
        seed: None leaves the weights uninitialized, for a caller that loads them.

    Raises:
        RuntimeError: a layer is not what `model` and `fp8` ask for (see `check_layers`).
    """
    config = transformer_config(geometry, model, groups, fp8)
    frequencies, _ = scaled_rope(geometry)
    num_chunks = groups.layout.virtual_pipeline

    def chunk_of(chunk: int | None) -> M:
        first, last = chunk in (None, 0), chunk in (None, num_chunks - 1)
        with device():  # of torch's own modules, such as norms, too
            module = make(
                config=config,
                transformer_layer_spec=layer_spec(config, model.implementation, chunk),
                vocab_size=padded_vocab_size(vocab_size, groups),
                max_sequence_length=model.max_sequence_length,
                pre_process=groups.is_first_stage and first,
                post_process=groups.is_last_stage and last,
                parallel_output=True,
                share_embeddings_and_output_weights=tied_embeddings,
                position_embedding_type="rope",
                rotary_base=geometry.rope_theta,
                pg_collection=groups.collection,
                vp_stage=chunk,
            )
        if frequencies is not None:
            module.rotary_pos_emb.inv_freq = frequencies.to(module.rotary_pos_emb.inv_freq.device)
        # Only generation reads this group, on rows that are not packed, where every context rank has all positions.
        module.rotary_pos_emb.cp_group = None
        check_layers(module, model.implementation)
        if seed is not None:
            draw_weights(module, vocab_size=vocab_size, std=geometry.init_std, seed=seed, groups=groups)
        return module

    return chunk_of(None) if num_chunks == 1 else ModelChunks([chunk_of(chunk) for chunk in range(num_chunks)])
