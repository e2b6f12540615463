"""The token-level reward model w: a GPTModel with one scalar a position (section 3.3 of the paper)."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from oreal_megatron.config import Fp8ModelConfig, GeometryConfig, ModelConfig
from oreal_megatron.distributed.groups import ParallelGroups
from oreal_megatron.models.gpt import build_gpt
from oreal_megatron.models.virtual_stages import ModelChunks


class ScalarHead(torch.nn.Linear):
    """A linear map to one fp32 score, replicated over tensor ranks; weight and bias start at zero."""

    def __init__(self, config: TransformerConfig, tensor_group: dist.ProcessGroup, *, train_bias: bool):
        super().__init__(config.hidden_size, 1, bias=True, dtype=torch.float32)
        torch.nn.init.zeros_(self.weight)
        torch.nn.init.zeros_(self.bias.requires_grad_(train_bias))
        self.sequence_parallel = config.sequence_parallel
        self.tensor_group = tensor_group
        for parameter in self.parameters():
            # Under sequence parallelism each rank has some of the tokens: Megatron-Core sums marked gradients.
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(  # type: ignore[override]  # the call of an output layer, not that of nn.Linear
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, None]:
        """Maps [S, B, H] to fp32 [S, B, 1], with the signature of Megatron-Core's output layers."""
        scores = super().forward(input_.float())
        if self.sequence_parallel:
            # Every rank computes the same with the scores, so the gradient is sliced, not summed.
            scores = gather_from_sequence_parallel_region(
                scores, tensor_parallel_output_grad=False, group=self.tensor_group
            )
        return scores, None


class TokenRewardModel(GPTModel):
    """A GPTModel whose forward returns fp32 scores [1, T, 1] of the state after each token."""

    def __init__(self, *args: object, train_head_bias: bool = True, **kwargs: object):
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        if self.post_process:
            self.output_layer = ScalarHead(self.config, self.pg_collection.tp, train_bias=train_head_bias)

    def forward(self, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Returns the scores. The labels of a packed batch are ignored: with them GPTModel returns a loss."""
        return super().forward(*args, **kwargs)


def build_reward_model(
    geometry: GeometryConfig,
    model: ModelConfig,
    groups: ParallelGroups,
    *,
    vocab_size: int,
    seed: int | None,
    train_head_bias: bool = True,
    fp8: Fp8ModelConfig | None = None,
) -> TokenRewardModel | ModelChunks:
    """Builds this rank's part of a reward model. See `build_gpt` for the other arguments and errors.

    train_head_bias: False keeps the bias of the scalar head at 0.
    """
    make = functools.partial(TokenRewardModel, train_head_bias=train_head_bias)
    return build_gpt(make, geometry, model, groups, vocab_size=vocab_size, seed=seed, tied_embeddings=False, fp8=fp8)
