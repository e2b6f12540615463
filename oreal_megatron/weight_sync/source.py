"""The trainer's side of a publication: this rank's tensors, and how the model is split over the ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from oreal_megatron.config import GeometryConfig
from oreal_megatron.conversion.families import family_of
from oreal_megatron.conversion.layout import Layout
from oreal_megatron.conversion.module import shard_parameters
from oreal_megatron.distributed.groups import ParallelGroups


class PolicyShards:
    """The policy's weights on this rank, with the table and the layout that describe all ranks' weights."""

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        geometry: GeometryConfig,
        groups: ParallelGroups,
        dtype: torch.dtype | None = None,
    ):
        """Every rank creates one.

        chunks: this rank's GPTModels. geometry: with vocab_size, without padding. dtype: dtype of the published
        weights; None for the policy's own.
        """
        self.chunks = chunks
        self.geometry = geometry
        self.groups = groups
        self.table = family_of(geometry).table(geometry, "causal")
        self.dtype = dtype or next(chunks[0].parameters()).dtype
        """Dtype that weights are transferred in."""
        self._parameters: dict[str, torch.nn.Parameter] = {}
        rows_a_rank = 1
        for chunk in chunks:
            for part in shard_parameters(chunk, self.table, groups):
                self._parameters[part.entry.name] = part.parameter
                if part.num_rows is not None:
                    rows_a_rank = part.num_rows // groups.tensor_size
        self.layout = Layout(
            groups.layout.tensor,
            groups.layout.pipeline,
            groups.layout.virtual_pipeline,
            # The main rank is in the first stage, which has the embedding.
            vocabulary_multiple=groups.from_main(rows_a_rank),
            context=groups.layout.context,
            data=groups.data_size,
        )
        """Split of the model over the trainer's ranks."""

    def tensors(self) -> dict[str, Tensor]:
        """Returns this rank's tensors by Megatron's name, in the policy's own dtype.

        A tied embedding has the same name on the first and on the last stage.
        """
        return {name: parameter.detach() for name, parameter in self._parameters.items()}

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole model in the dtype of the transfer."""
        return sum(torch.Size(origin.shape).numel() for origin in self.table.origins.values()) * self.dtype.itemsize
