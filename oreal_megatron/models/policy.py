"""The policy: a GPTModel that returns log-probabilities and entropies in place of logits.

Shapes: T packed tokens, R of them predict a response token, V vocabulary rows of this tensor rank, H hidden size.
A tile has C positions and B rows of the vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from oreal_megatron.config import Fp8ModelConfig, GeometryConfig, ModelConfig
from oreal_megatron.data.packing import IGNORE
from oreal_megatron.distributed.cpu_backend import device
from oreal_megatron.distributed.groups import ParallelGroups
from oreal_megatron.models.gpt import build_gpt
from oreal_megatron.models.virtual_stages import ModelChunks

CPU_TILE = 2**20
"""Number of logits in a tile on a CPU: 4 MiB in fp32, which fit its cache."""


class _Tiles:
    """Iterates over tiles of logits [C, B], in memory that all tiles share.

    New pages for every tile would cost a CPU as much time as the arithmetic. Blocks of the vocabulary are the outer
    loop, so that their rows of the weight stay in the cache for all positions.
    """

    def __init__(
        self, hidden_RH: Tensor, weight_VH: Tensor, target_R: Tensor, first: int, chunk: int, size: int | None
    ):
        self._hidden_RH, self._weight_VH, self._target_R, self._first = hidden_RH, weight_VH, target_R, first
        self._rows = max(1, min(chunk, hidden_RH.size(0)))
        num_rows = max(1, weight_VH.size(0))  # a rank may hold nothing but rows of padding
        self._block = num_rows if size is None else min(num_rows, max(1, size // self._rows))
        self._product = weight_VH.new_empty(self._rows * self._block)
        self._is_fp32 = weight_VH.dtype == torch.float32
        self._fp32 = self._product if self._is_fp32 else torch.empty_like(self._product, dtype=torch.float32)

    def __iter__(self) -> Iterator[tuple[slice, slice, Tensor, Tensor, Tensor]]:
        """Yields (positions, tokens, writable fp32 logits [C, B], targets' columns [C, 1], whether in the tile [C])."""
        for low in range(0, self._weight_VH.size(0), self._block):
            tokens = slice(low, min(low + self._block, self._weight_VH.size(0)))
            weight_BH = self._weight_VH[tokens]
            for start in range(0, self._hidden_RH.size(0), self._rows):
                positions = slice(start, min(start + self._rows, self._hidden_RH.size(0)))
                hidden_CH = self._hidden_RH[positions]
                product = self._of_size(self._product, len(hidden_CH), len(weight_BH))
                logits = torch.mm(hidden_CH, weight_BH.t(), out=product)
                if not self._is_fp32:
                    logits = self._of_size(self._fp32, len(hidden_CH), len(weight_BH)).copy_(product)
                column = self._target_R[positions] - self._first - low
                inside = (column >= 0) & (column < len(weight_BH))
                yield positions, tokens, logits, column.where(inside, 0).unsqueeze(-1), inside

    def spare(self) -> Tensor:
        """Returns an fp32 tensor with as many elements as a full tile."""
        return torch.empty_like(self._fp32)

    def as_weights(self, logits_CB: Tensor) -> Tensor:
        """Converts the present tile to the dtype of the weights."""
        return logits_CB if self._is_fp32 else self._of_size(self._product, *logits_CB.shape).copy_(logits_CB)

    @staticmethod
    def _of_size(memory: Tensor, rows: int, columns: int) -> Tensor:
        return memory[: rows * columns].view(rows, columns)


class _TokenLogprobs(torch.autograd.Function):
    """Log-probability of each target and entropy of each distribution, computed by tiles of logits.

    The forward pass keeps the running maximum, normalizer and first moment of each position. The backward pass
    recomputes each tile and turns it into its own gradient in place. The entropy has no gradient. The arguments are
    those of `token_logprobs`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_RH: Tensor,
        weight_VH: Tensor,
        target_R: Tensor,
        first: int,
        chunk: int,
        size: int | None,
        group: dist.ProcessGroup,
    ) -> tuple[Tensor, Tensor]:
        lowest = torch.finfo(torch.float32).min / 2  # not -inf, since 0 * inf is NaN
        top = torch.full(target_R.shape, lowest, device=hidden_RH.device)
        # Sums over the vocabulary: exp(logit - top), exp(logit - top) * (logit - top), and the target's logit.
        sums_3R = torch.zeros(3, *target_R.shape, device=hidden_RH.device)
        tiles = _Tiles(hidden_RH, weight_VH, target_R, first, chunk, size)
        spare = tiles.spare()
        for positions, _, logits, column, inside in tiles:
            chosen = logits.gather(-1, column).squeeze(-1).where(inside, 0.0)
            highest = torch.maximum(top[positions], logits.amax(-1))
            _move_top(sums_3R[:, positions], top[positions], highest)
            logits -= highest.unsqueeze(-1)
            weights = torch.exp(logits, out=spare[: logits.numel()].view_as(logits))
            sums_3R[:, positions] += torch.stack([weights.sum(-1), torch.linalg.vecdot(weights, logits), chosen])
        highest = top.clone()
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
        _move_top(sums_3R, top, highest)
        dist.all_reduce(sums_3R, group=group)
        total, moment, chosen = sums_3R
        normalizer = top + total.log()
        ctx.save_for_backward(hidden_RH, weight_VH, target_R, normalizer)
        ctx.tiling = first, chunk, size
        entropy = total.log() - moment / total
        ctx.mark_non_differentiable(entropy)
        return chosen - normalizer, entropy

    @staticmethod
    def backward(ctx: Any, grad_R: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden_RH, weight_VH, target_R, normalizer_R = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden_RH, dtype=torch.float32)
        grad_weight = torch.zeros_like(weight_VH, dtype=torch.float32)
        tiles = _Tiles(hidden_RH, weight_VH, target_R, *ctx.tiling)
        for positions, tokens, dlogits, column, inside in tiles:
            # The tile becomes minus the gradient of the log-probabilities; `grad_R` multiplies smaller factors below.
            dlogits.sub_(normalizer_R[positions].unsqueeze(-1)).exp_()
            dlogits.scatter_add_(-1, column, -inside.to(dlogits.dtype).unsqueeze(-1))
            dlogits = tiles.as_weights(dlogits)
            by_row = -grad_R[positions].unsqueeze(-1)
            _add_product(grad_hidden[positions], dlogits, weight_VH[tokens])
            _add_product(grad_weight[tokens], dlogits.t(), hidden_RH[positions] * by_row.to(hidden_RH.dtype))
        grad_hidden.mul_(-grad_R.unsqueeze(-1))
        return grad_hidden.to(hidden_RH.dtype), grad_weight.to(weight_VH.dtype), None, None, None, None, None


def _move_top(sums_3R: Tensor, top_R: Tensor, highest_R: Tensor) -> None:
    """Rescales sums that are relative to `top` to `highest`, and sets `top` to `highest`, in place."""
    shift = top_R - highest_R
    total, moment, _ = sums_3R
    moment.addcmul_(total, shift).mul_(shift.exp())
    total.mul_(shift.exp())
    top_R.copy_(highest_R)


def _add_product(sum_NM: Tensor, left_NK: Tensor, right_KM: Tensor) -> None:
    """Adds left @ right to the fp32 sum, whatever the dtype of the factors."""
    if sum_NM.dtype == left_NK.dtype:
        sum_NM.addmm_(left_NK, right_KM)
    else:
        sum_NM += left_NK @ right_KM


def token_logprobs(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    target_R: Tensor,
    first: int,
    *,
    chunk: int,
    size: int | None = None,
    group: dist.ProcessGroup,
) -> tuple[Tensor, Tensor]:
    """Computes log-probabilities and entropies without holding all logits.

    Args:
        hidden_RH: states of the last layer.
        weight_VH: this tensor rank's rows of the output layer.
        target_R: int64 token ids.
        first: row of the vocabulary that is the first of `weight_VH`.
        chunk: positions whose logits exist at the same time.
        size: logits that exist at the same time; None: all of the rank's vocabulary for `chunk` positions.
        group: tensor-parallel group.

    Returns:
        (log-probability of each target, entropy of each distribution), fp32 [R] in nats; the latter has no gradient.
    """
    return _TokenLogprobs.apply(hidden_RH, weight_VH, target_R, first, chunk, size, group)


class Policy(GPTModel):
    """A GPTModel whose forward with `labels` returns log-probabilities and entropies of the labelled positions."""

    def __init__(self, *, num_tokens: int, logprob_chunk_tokens: int, logprob_tile_size: int | None, **gpt: Any):
        """Builds the model.

        Args:
            num_tokens: rows of the vocabulary that are tokens; the rows after them are padding and have no part in
                any distribution.
            logprob_chunk_tokens: positions whose logits exist at the same time.
            logprob_tile_size: logits that exist at the same time; None: all of the rank's vocabulary for each of
                these positions, which suits a GPU.
            gpt: the arguments of GPTModel.
        """
        super().__init__(**gpt)
        self.num_tokens = num_tokens
        self.logprob_chunk_tokens = logprob_chunk_tokens
        self.logprob_tile_size = logprob_tile_size

    def _postprocess(self, hidden_states: Tensor, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Returns fp32 [T, 2], log-probability and entropy in nats, 0 where labels [1, T] are IGNORE."""
        if labels is None or not self.post_process:
            return super()._postprocess(hidden_states, *args, labels=labels, **kwargs)
        (predicting,) = torch.where(labels[0] != IGNORE)
        values_R2 = self.labelled(hidden_states, predicting, labels[0].index_select(0, predicting))
        return values_R2.new_zeros(labels.size(1), 2).index_copy(0, predicting, values_R2)

    def labelled(self, hidden_states: Tensor, predicting_R: Tensor, target_R: Tensor) -> Tensor:
        """Returns the targets' log-probability and entropy in nats, fp32 [R, 2], from the last states [T, 1, H]."""
        if self.config.sequence_parallel:
            hidden_TH = gather_from_sequence_parallel_region(hidden_states, group=self.pg_collection.tp).squeeze(1)
        else:
            hidden_TH = copy_to_tensor_model_parallel_region(hidden_states, group=self.pg_collection.tp).squeeze(1)
        weight = (
            self.shared_embedding_or_output_weight()
            if self.share_embeddings_and_output_weights
            else self.output_layer.weight
        )
        first = self.pg_collection.tp.rank() * weight.size(0)
        # Only the last ranks have rows of padding, with a tiny vocabulary a rank may have nothing else. Other ranks
        # do not slice: the gradient of a slice is a copy of the whole weight.
        if self.num_tokens - first < weight.size(0):
            weight = weight[: max(self.num_tokens - first, 0)]
        logprobs_R, entropy_R = token_logprobs(
            hidden_TH.index_select(0, predicting_R),
            weight,
            target_R,
            first,
            chunk=self.logprob_chunk_tokens,
            size=self.logprob_tile_size,
            group=self.pg_collection.tp,
        )
        return torch.stack([logprobs_R, entropy_R], dim=-1)


def build_policy(
    geometry: GeometryConfig,
    model: ModelConfig,
    groups: ParallelGroups,
    *,
    vocab_size: int,
    seed: int | None,
    fp8: Fp8ModelConfig | None = None,
    on_cpu: bool | None = None,
) -> Policy | ModelChunks:
    """Builds this rank's part of a policy. See `build_gpt` for the arguments and errors.

    on_cpu: whether the policy will compute on a CPU; None: on the device of this process.
    """
    on_cpu = device().type == "cpu" if on_cpu is None else on_cpu
    make = functools.partial(
        Policy,
        num_tokens=vocab_size,
        logprob_chunk_tokens=model.logprob_chunk_tokens,
        logprob_tile_size=CPU_TILE if on_cpu else None,
    )
    return build_gpt(
        make,
        geometry,
        model,
        groups,
        vocab_size=vocab_size,
        seed=seed,
        tied_embeddings=geometry.tied_embeddings,
        fp8=fp8,
    )
