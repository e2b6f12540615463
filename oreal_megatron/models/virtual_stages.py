"""Virtual pipeline stages: a stage's model under the interleaved schedule is several GPTModels, its model chunks."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig


class ModelChunks(torch.nn.ModuleList):
    """The model chunks of a pipeline stage, in the order of the network.

    A stage with a single chunk is a plain GPTModel. This class has the part of GPTModel's interface that checkpoints
    and optimizers use.
    """

    @property
    def config(self) -> TransformerConfig:
        """Configuration, which all chunks share."""
        return self[0].config

    def sharded_state_dict(self, prefix: str = "", **options: Any) -> dict[str, Any]:
        """Returns the sharded state, as GPTModel does.

        Keys are prefixed with the chunk's index, as `load_state_dict` expects, since every chunk counts its layers from
        0. The tensors have their names in the whole network, so that every layout can load them.
        """
        return {
            f"{prefix}{index}.{key.removeprefix(prefix)}": value
            for index, chunk in enumerate(chunks_of(self))
            for key, value in chunk.sharded_state_dict(prefix=prefix, **options).items()
        }


def chunks_of(model: torch.nn.Module) -> list[GPTModel]:
    """Returns the GPTModels of a stage, in the order of the network."""
    return list(model) if isinstance(model, ModelChunks) else [model]  # type: ignore[list-item]
