"""Initial weights, the same in every layout: each tensor is drawn whole from the seed and its name, then split."""

from __future__ import annotations

import math
import re

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from oreal_megatron.distributed.groups import ParallelGroups
from oreal_megatron.seeds import derive_seed

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
# Matrices that add to the residual stream, whose variance grows with depth.
_INTO_RESIDUAL = ("linear_proj.weight", "linear_fc2.weight")
_OVER_VOCABULARY = ("word_embeddings.weight", "output_layer.weight")


@torch.no_grad()
def draw_weights(module: GPTModel, *, vocab_size: int, std: float, seed: int, groups: ParallelGroups) -> None:
    """Fills every parameter of `module`, whichever part of the network it holds.

    Matrices are drawn from N(0, std); matrices that add to the residual stream from N(0, std / sqrt(2 num_layers)), as
    in GPT-2. Norms are ones. Biases and rows after `vocab_size` are zeros.
    """
    narrow = std / math.sqrt(2.0 * module.config.num_layers)
    for name, parameter in module.named_parameters():
        if name.startswith("output_layer.") and not _is_split(parameter):
            continue  # the scalar head of a reward model has its own initial values
        if name.endswith("bias"):
            parameter.zero_()
        elif parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            generator = torch.Generator().manual_seed(derive_seed(seed, name_in_network(module, name)))
            shape = whole_shape(name, parameter, vocab_size, groups)
            whole = torch.empty(shape).normal_(
                0.0, narrow if name.endswith(_INTO_RESIDUAL) else std, generator=generator
            )
            parameter.copy_(part_of(name, whole, parameter, groups))


def name_in_network(module: GPTModel, name: str) -> str:
    """Returns a parameter's name in the unsplit network: layers count from 0 over all stages."""
    if name == "output_layer.weight" and module.share_embeddings_and_output_weights:
        return "embedding.word_embeddings.weight"
    if not (match := _LAYER.match(name)):
        return name
    number = module.decoder.layers[int(match[1])].layer_number - 1
    return f"decoder.layers.{number}.{name[match.end() :]}"


def whole_shape(name: str, parameter: Tensor, vocab_size: int, groups: ParallelGroups) -> tuple[int, ...]:
    """Returns the shape of the unsplit parameter, without rows of padding."""
    shape = list(parameter.shape)
    if name.endswith(_OVER_VOCABULARY) and _is_split(parameter):
        shape[0] = vocab_size
    elif _is_split(parameter):
        shape[parameter.partition_dim] *= groups.tensor_size  # type: ignore[attr-defined]
    return tuple(shape)


def part_of(name: str, whole: Tensor, parameter: Tensor, groups: ParallelGroups) -> Tensor:
    """Returns the tensor rank's part of an unsplit parameter; rows of padding are zeros."""
    if not _is_split(parameter):
        return whole
    size, rank = groups.tensor_size, groups.tensor_rank
    if name.endswith(_OVER_VOCABULARY):
        padding = whole.new_zeros(parameter.size(0) * size - whole.size(0), whole.size(1))
        return torch.cat([whole, padding]).chunk(size)[rank]
    if name.endswith("linear_fc1.weight"):
        # Each rank holds its rows of the gate, then its rows of the up projection.
        return torch.cat([half.chunk(size)[rank] for half in whole.chunk(2)])
    return whole.chunk(size, dim=parameter.partition_dim)[rank]  # type: ignore[attr-defined]


def _is_split(parameter: Tensor) -> bool:
    return bool(getattr(parameter, "tensor_model_parallel", False))
