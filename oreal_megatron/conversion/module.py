"""Loads a Hugging Face directory into a rank's part of a Megatron-Core module; a rank reads only its own slices."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oreal_megatron.conversion.huggingface import read_model
from oreal_megatron.conversion.naming import checkpoint_name
from oreal_megatron.conversion.rules import Box, Entry, Table
from oreal_megatron.conversion.weights import HuggingFaceWeights
from oreal_megatron.distributed.groups import ParallelGroups


@dataclass(frozen=True)
class ShardParameter:
    """A parameter of this rank's module, with the part of a tensor of the conversion table that it holds."""

    name: str
    """Name in the table; the second name (`Table.module_aliases`) for the last stage's copy of a tied embedding."""
    parameter: torch.nn.Parameter
    entry: Entry
    num_rows: int | None
    """Rows of the whole tensor with padding if it has a row for each token, otherwise None."""
    boxes: tuple[Box, ...]

    def parts(self) -> Iterator[tuple[Tensor, Box]]:
        """Yields each box with the parameter's rows that hold it, as a view."""
        first = 0
        for box in self.boxes:
            yield self.parameter[first : first + box.shape[0]], box
            first += box.shape[0]


def shard_parameters(module: torch.nn.Module, table: Table, groups: ParallelGroups) -> Iterator[ShardParameter]:
    """Yields all parameters of `module`, a pipeline stage or a virtual stage, local or of Transformer Engine.

    Raises:
        LookupError: the table does not have a parameter; its argument is the parameter's name in the module.
        ValueError: a tensor does not split over the tensor ranks.
    """
    layers: Any = module.get_submodule("decoder.layers")
    first_layer = layers[0].layer_number - 1 if len(layers) else 0  # Megatron-Core counts from 1, over all stages
    for name, parameter in module.named_parameters():
        known = checkpoint_name(name, first_layer=first_layer)
        entry = table.entries.get(table.module_aliases.get(known, known))
        if entry is None:
            raise LookupError(name)
        num_rows = parameter.size(0) * groups.tensor_size if entry.is_vocabulary else None
        boxes = entry.boxes(groups.tensor_size, groups.tensor_rank, num_rows)
        yield ShardParameter(known, parameter, entry, num_rows, boxes)


@torch.no_grad()
def load_weights(module: torch.nn.Module, path: Path, groups: ParallelGroups) -> None:
    """Fills every parameter of `module`, a pipeline stage or a virtual stage, local or of Transformer Engine.

    Weights are cast to the module's dtype; rows of the vocabulary that the directory does not have become zeros.

    Raises:
        ValueError: the directory is damaged or holds another model.
    """
    model = read_model(path)
    weights = HuggingFaceWeights(path)
    weights.check(model.table)
    try:
        parameters = list(shard_parameters(module, model.table, groups))
    except LookupError as error:
        raise ValueError(
            f"{path}: the module has {error.args[0]}, and {model.family.architectures[model.head]} has no such tensor"
        ) from error
    for item in parameters:
        entry, parameter, boxes = item.entry, item.parameter, item.boxes
        shape = (sum(box.shape[0] for box in boxes), *boxes[0].shape[1:])
        if shape != tuple(parameter.shape) or (item.num_rows is not None and item.num_rows < entry.shape[0]):
            raise ValueError(
                f"{path}: {entry.name} has shape {shape} on this rank, the module has {tuple(parameter.shape)}"
            )
        if entry.is_vocabulary:
            parameter.zero_()
        for part, box in item.parts():
            for copy in entry.sources(box):
                part[slice(*copy.at)].copy_(weights.read(copy.source, copy.box))
