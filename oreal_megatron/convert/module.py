"""Weights of a Hugging Face directory into this rank's part of a Megatron-Core module; it reads its slices alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from oreal_megatron.convert.huggingface import read_model
from oreal_megatron.convert.naming import checkpoint_name
from oreal_megatron.convert.weights import HuggingFaceWeights
from oreal_megatron.parallel.groups import ParallelGroups


@torch.no_grad()
def load_weights(module: torch.nn.Module, path: Path, groups: ParallelGroups) -> None:
    """Fills every parameter of `module`, a pipeline stage or a virtual one, local or Transformer Engine.

    Weights are cast to the module's dtype; rows of the vocabulary that the directory lacks become zeros.

    Raises:
        ValueError: the directory is damaged, or holds another model than the module's.
    """
    model = read_model(path)
    table = model.table
    weights = HuggingFaceWeights(path)
    weights.check(table)
    layers: Any = module.get_submodule("decoder.layers")
    first_layer = layers[0].layer_number - 1 if len(layers) else 0  # Megatron-Core counts from 1, over all stages
    for name, parameter in module.named_parameters():
        wanted = checkpoint_name(name, first_layer=first_layer)
        entry = table.entries.get(table.module_aliases.get(wanted, wanted))
        if entry is None:
            raise ValueError(f"{path}: the module's {name} is no tensor of {model.family.architectures[model.head]}")
        num_rows = parameter.size(0) * groups.tensor_size if entry.is_vocabulary else None
        boxes = entry.boxes(groups.tensor_size, groups.tensor_rank, num_rows)
        shape = (sum(box.shape[0] for box in boxes), *boxes[0].shape[1:])
        if shape != tuple(parameter.shape) or (num_rows is not None and num_rows < entry.shape[0]):
            raise ValueError(f"{path}: {entry.name} comes out as {shape}, the module has {tuple(parameter.shape)}")
        if entry.is_vocabulary:
            parameter.zero_()
        first = 0
        for box in boxes:
            part = parameter[first : first + box.shape[0]]
            for copy in entry.sources(box):
                part[slice(*copy.at)].copy_(weights.read(copy.source, copy.box))
            first += box.shape[0]
