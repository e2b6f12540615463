"""Weights of a Hugging Face directory into this rank's part of a Megatron-Core module, through transformers' loader.

Shapes: H hidden, G query groups, Q heads of a group, D head dimension, F ffn, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from oreal_megatron.config import GeometryConfig
from oreal_megatron.parallel.groups import ParallelGroups

SUPPORTED = ("LlamaForCausalLM", "Qwen2ForCausalLM")


def geometry_of(path: Path) -> GeometryConfig:
    """The geometry in a directory's config.json.

    Raises:
        ValueError: no such directory, an architecture that is not supported, or scaled rotary embeddings.
    """
    if not (path / "config.json").is_file():
        raise ValueError(f"model.path = {path}: there is no config.json in it")
    config = AutoConfig.from_pretrained(path)
    architecture = (config.architectures or ["?"])[0]
    if architecture not in SUPPORTED:
        raise ValueError(f"model.path = {path}: {architecture} is not supported; supported: {', '.join(SUPPORTED)}")
    rope = getattr(config, "rope_parameters", None) or {"rope_theta": getattr(config, "rope_theta", 10000.0)}
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"model.path = {path}: rotary embeddings of type {rope['rope_type']!r} are not supported")
    return GeometryConfig(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None),
        vocab_size=config.vocab_size,
        rope_theta=float(rope["rope_theta"]),
        norm_eps=config.rms_norm_eps,
        qkv_bias=architecture == "Qwen2ForCausalLM",
        tied_embeddings=bool(config.tie_word_embeddings),
    )


@torch.no_grad()
def load_weights(module: torch.nn.Module, path: Path, geometry: GeometryConfig, groups: ParallelGroups) -> None:
    """Fills every parameter of `module` from the directory.

    Raises:
        ValueError: a tensor is missing or has another shape than the module's.
    """
    model = AutoModelForCausalLM.from_pretrained(path, dtype=next(module.parameters()).dtype)
    source = model.state_dict()
    unread = set(source) - ({"lm_head.weight"} if geometry.tied_embeddings else set())

    def read(name: str) -> Tensor:
        if name not in source:
            raise ValueError(f"{path}: tensor {name} is missing")
        unread.discard(name)
        return source[name]

    for name, parameter in module.named_parameters():
        full = _full_tensor(name, module, geometry, read)
        local = _slice_of(name, full, parameter, groups)
        if local.shape != parameter.shape:
            raise ValueError(
                f"{path}: {name} comes out as {tuple(local.shape)}, the model has {tuple(parameter.shape)}"
            )
        parameter.copy_(local)
    if unread and groups.pipeline_size == 1:
        raise ValueError(f"{path}: tensors that the model has no place for: {', '.join(sorted(unread)[:5])}")


def _full_tensor(name: str, module: torch.nn.Module, geometry: GeometryConfig, read: Callable[[str], Tensor]) -> Tensor:
    """The unsplit tensor of a Megatron parameter, from its Hugging Face tensors."""
    outer = {
        "embedding.word_embeddings.weight": "model.embed_tokens.weight",
        "decoder.final_layernorm.weight": "model.norm.weight",
        "output_layer.weight": "model.embed_tokens.weight" if geometry.tied_embeddings else "lm_head.weight",
    }
    if name in outer:
        return read(outer[name])
    _, _, local_index, part = name.split(".", 3)
    number: Any = module.get_submodule(f"decoder.layers.{local_index}").layer_number  # from 1, over all stages
    layer = f"model.layers.{number - 1}."
    inner = {
        "input_layernorm.weight": "input_layernorm.weight",
        "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
        "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
        "mlp.linear_fc2.weight": "mlp.down_proj.weight",
    }
    if part in inner:
        return read(layer + inner[part])
    if part == "mlp.linear_fc1.weight":
        return torch.cat([read(layer + "mlp.gate_proj.weight"), read(layer + "mlp.up_proj.weight")])
    kind = part.removeprefix("self_attention.linear_qkv.")
    # [G * (Q + 2) * D, H]: the queries of a group, then its key, then its value.
    by_group = [
        read(f"{layer}self_attn.{letter}_proj.{kind}").unflatten(0, (geometry.num_query_groups, -1)) for letter in "qkv"
    ]
    return torch.cat(by_group, dim=1).flatten(0, 1)


def _slice_of(name: str, full: Tensor, parameter: Tensor, groups: ParallelGroups) -> Tensor:
    """This tensor rank's part; vocabulary rows that the source lacks are zeros."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return full
    size, rank = groups.tensor_size, groups.tensor_rank
    if "linear_fc1" in name:
        return torch.cat([half.chunk(size)[rank] for half in full.chunk(2)])
    if "word_embeddings" in name or "output_layer" in name:
        missing = parameter.size(0) * size - full.size(0)
        full = torch.cat([full, full.new_zeros(missing, full.size(1))])
    return full.chunk(size, dim=parameter.partition_dim)[rank]  # type: ignore[attr-defined]
