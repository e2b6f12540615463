"""The model of a pipeline stage under the interleaved schedule: several model chunks, each a GPTModel."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig


class ModelChunks(torch.nn.ModuleList):
    """The model chunks of a pipeline stage, in the order of the network.

    A stage with one chunk is a plain GPTModel; this class gives several chunks the part of its interface that
    checkpoints and optimizers use.
    """

    @property
    def config(self) -> TransformerConfig:
        """The configuration that all chunks share."""
        return self[0].config

    def sharded_state_dict(self, prefix: str = "", **options: Any) -> dict[str, Any]:
        """Returns the sharded state of all chunks.

        Entries are named by chunk, since each chunk numbers its layers from 0, as `load_state_dict` expects them. The
        tensors inside have their names in the whole network, so that any layout can load them.
        """
        return {
            f"{prefix}{index}.{key.removeprefix(prefix)}": value
            for index, chunk in enumerate(chunks_of(self))
            for key, value in chunk.sharded_state_dict(prefix=prefix, **options).items()
        }


def chunks_of(model: torch.nn.Module) -> list[GPTModel]:
    """Returns the GPTModels of a stage, in the order of the network."""
    return list(model) if isinstance(model, ModelChunks) else [model]  # type: ignore[list-item]
