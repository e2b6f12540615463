"""A stage's model under the interleaved schedule: several GPTModels, each a run of layers."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig


class ModelChunks(torch.nn.ModuleList):
    """The runs of layers that one pipeline stage holds, in the order of the network.

    With one run a stage is a plain GPTModel; this class gives several the part of its interface that
    checkpoints and optimizers use.
    """

    @property
    def config(self) -> TransformerConfig:
        """Shared by all chunks."""
        return self[0].config

    def sharded_state_dict(self, prefix: str = "", **options: Any) -> dict[str, Any]:
        """Like GPTModel's. Entries are named by chunk, since each numbers its layers from 0, as `load_state_dict`
        expects them; the tensors inside carry their names in the whole network, so any layout can load them.
        """
        return {
            f"{prefix}{index}.{key.removeprefix(prefix)}": value
            for index, chunk in enumerate(chunks_of(self))
            for key, value in chunk.sharded_state_dict(prefix=prefix, **options).items()
        }


def chunks_of(model: torch.nn.Module) -> list[GPTModel]:
    """The GPTModels of a stage, in the order of the network."""
    return list(model) if isinstance(model, ModelChunks) else [model]  # type: ignore[list-item]
