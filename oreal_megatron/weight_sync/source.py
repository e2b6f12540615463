"""What the trainer has to publish: this rank's tensors, and who holds what."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from oreal_megatron.config import GeometryConfig
from oreal_megatron.conversion.families import family_of
from oreal_megatron.conversion.layout import Layout
from oreal_megatron.conversion.module import held_parameters
from oreal_megatron.distributed.groups import ParallelGroups
from oreal_megatron.weight_sync.planner import TrainerLayout


class PolicyShards:
    """The policy, as every transport sees it."""

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        geometry: GeometryConfig,
        groups: ParallelGroups,
        dtype: torch.dtype | None = None,
    ):
        """chunks: this rank's GPTModels. geometry: with vocab_size, without padding. dtype: that they are published in;
        None: their own. Every rank makes one."""
        self.chunks = chunks
        self.geometry = geometry
        self.groups = groups
        self.table = family_of(geometry).table(geometry, "causal")
        self.dtype = dtype or next(chunks[0].parameters()).dtype
        """What travels, whatever the policy has."""
        self._parameters: dict[str, torch.nn.Parameter] = {}
        rows_a_rank = 1
        for chunk in chunks:
            for held in held_parameters(chunk, self.table, groups):
                self._parameters[held.entry.name] = held.parameter
                if held.num_rows is not None:
                    rows_a_rank = held.num_rows // groups.tensor_size
        layout = groups.layout
        self.trainer = TrainerLayout(
            # The main rank's first stage has the embedding.
            Layout(layout.tensor, layout.pipeline, layout.virtual_pipeline, groups.from_main(rows_a_rank)),
            context=layout.context,
            data=groups.data_size,
        )

    def tensors(self) -> dict[str, Tensor]:
        """This rank's, in the policy's own dtype, by Megatron's name; a tied embedding has one name on every stage."""
        return {name: parameter.detach() for name, parameter in self._parameters.items()}

    @property
    def num_bytes(self) -> int:
        """Of the whole model."""
        return sum(torch.Size(origin.shape).numel() for origin in self.table.origins.values()) * self.dtype.itemsize
