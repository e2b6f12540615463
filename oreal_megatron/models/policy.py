"""The policy: a GPTModel that answers with log-probabilities and entropies instead of logits.

Shapes: T packed tokens, R of them before a response token, V vocabulary, V' = V / tensor ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from oreal_megatron.data.packing import IGNORE


class _ChunkLogits:
    """Memory for one chunk's logits, used by all: on a CPU fresh pages for each cost as much as the arithmetic."""

    def __init__(self, weight_VH: Tensor, hidden_RH: Tensor, chunk: int):
        rows = min(chunk, hidden_RH.size(0))
        self._weight_VH = weight_VH
        self._product = weight_VH.new_empty(rows, weight_VH.size(0))
        is_fp32 = weight_VH.dtype == torch.float32
        self._fp32 = self._product if is_fp32 else torch.empty_like(self._product, dtype=torch.float32)

    def of(self, hidden_CH: Tensor) -> Tensor:
        """fp32 [C, V'], to be written to; those of the chunk before are gone."""
        product = torch.mm(hidden_CH, self._weight_VH.t(), out=self._product[: hidden_CH.size(0)])
        return product if self._fp32 is self._product else self._fp32[: hidden_CH.size(0)].copy_(product)

    def as_weights(self, logits_CV: Tensor) -> Tensor:
        """What `of` gave, in the dtype of the weights."""
        return logits_CV if self._fp32 is self._product else self._product[: logits_CV.size(0)].copy_(logits_CV)


class _TokenLogprobs(torch.autograd.Function):
    """Log-probability of each target and entropy of each distribution, `chunk` positions at a time.

    Logits [chunk, V'] exist for one chunk only, in the forward and again in the backward pass, which
    recomputes them and turns them into their own gradient in place. The entropy carries no gradient.
    weight_VH: this rank's rows of the output layer, the first of them row `first` of the vocabulary.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_RH: Tensor,
        weight_VH: Tensor,
        target_R: Tensor,
        first: int,
        chunk: int,
        group: dist.ProcessGroup,
    ) -> tuple[Tensor, Tensor]:
        logprobs, entropies, normalizers = [], [], []
        chunk_logits = _ChunkLogits(weight_VH, hidden_RH, chunk)
        weights_CV = torch.empty(min(chunk, len(hidden_RH)), len(weight_VH), device=weight_VH.device)
        for hidden, target in zip(hidden_RH.split(chunk), target_R.split(chunk), strict=True):
            logits = chunk_logits.of(hidden)
            top = logits.amax(-1)
            dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
            local = target - first
            mine = (local >= 0) & (local < weight_VH.size(0))
            chosen = logits.gather(-1, local.where(mine, 0).unsqueeze(-1)).squeeze(-1).where(mine, 0.0)
            logits -= top.unsqueeze(-1)
            weights = torch.exp(logits, out=weights_CV[: len(logits)])
            # One all-reduce for the three sums over the vocabulary.
            sums = torch.stack([weights.sum(-1), torch.linalg.vecdot(weights, logits), chosen])
            dist.all_reduce(sums, group=group)
            total, moment, chosen = sums
            log_total = total.log()
            logprobs.append(chosen - top - log_total)
            entropies.append(log_total - moment / total)
            normalizers.append(top + log_total)
        normalizer = torch.cat(normalizers)
        ctx.save_for_backward(hidden_RH, weight_VH, target_R, normalizer)
        ctx.chunk, ctx.first = chunk, first
        entropy = torch.cat(entropies)
        ctx.mark_non_differentiable(entropy)
        return torch.cat(logprobs), entropy

    @staticmethod
    def backward(ctx: Any, grad_R: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden_RH, weight_VH, target_R, normalizer_R = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden_RH)
        grad_weight = torch.zeros_like(weight_VH, dtype=torch.float32)
        chunk_logits = _ChunkLogits(weight_VH, hidden_RH, ctx.chunk)
        pieces = (hidden_RH, target_R, normalizer_R, grad_R, grad_hidden)
        for hidden, target, normalizer, grad, out in zip(*(p.split(ctx.chunk) for p in pieces), strict=True):
            # Minus the gradient of each log-probability; the rows' own gradients go onto what has few columns.
            dlogits = chunk_logits.of(hidden)
            dlogits.sub_(normalizer.unsqueeze(-1)).exp_()
            local = target - ctx.first
            mine = (local >= 0) & (local < weight_VH.size(0))
            dlogits.scatter_add_(-1, local.where(mine, 0).unsqueeze(-1), -mine.to(dlogits.dtype).unsqueeze(-1))
            dlogits = chunk_logits.as_weights(dlogits)
            by_row = -grad.unsqueeze(-1)
            torch.mm(dlogits, weight_VH, out=out).mul_(by_row)
            scaled = hidden * by_row.to(hidden.dtype)
            if grad_weight.dtype == dlogits.dtype:
                grad_weight.addmm_(dlogits.t(), scaled)
            else:
                grad_weight += dlogits.t() @ scaled
        return grad_hidden, grad_weight.to(weight_VH.dtype), None, None, None, None


def token_logprobs(
    hidden_RH: Tensor, weight_VH: Tensor, target_R: Tensor, first: int, chunk: int, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """(log-probability of each target, entropy of each distribution), fp32 [R] in nats; the latter without gradient.

    weight_VH: this tensor rank's rows of the output layer, the first of them row `first` of the vocabulary.
    """
    return _TokenLogprobs.apply(hidden_RH, weight_VH, target_R, first, chunk, group)


class Policy(GPTModel):
    """A GPTModel whose forward with `labels` gives log-probabilities and entropies of the labelled positions."""

    logprob_chunk_tokens: int = 1024
    num_tokens: int | None = None
    """Rows of the vocabulary that are tokens; those behind them are padding, outside every distribution. None: all."""

    def _postprocess(self, hidden_states: Tensor, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Tensor:
        """With labels [1, T] (IGNORE where none): fp32 [T, 2] of log-probability and entropy in nats, 0 elsewhere."""
        if labels is None or not self.post_process:
            return super()._postprocess(hidden_states, *args, labels=labels, **kwargs)
        (predicting,) = torch.where(labels[0] != IGNORE)
        values_R2 = self.labelled(hidden_states, predicting, labels[0].index_select(0, predicting))
        return values_R2.new_zeros(labels.size(1), 2).index_copy(0, predicting, values_R2)

    def labelled(self, hidden_states: Tensor, predicting_R: Tensor, target_R: Tensor) -> Tensor:
        """fp32 [R, 2]: log-probability and entropy in nats of the targets, from the last layer's states [T, 1, H]."""
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
        if self.num_tokens is not None:
            weight = weight[: self.num_tokens - first]
        logprobs_R, entropy_R = token_logprobs(
            hidden_TH.index_select(0, predicting_R),
            weight,
            target_R,
            first,
            self.logprob_chunk_tokens,
            self.pg_collection.tp,
        )
        return torch.stack([logprobs_R, entropy_R], dim=-1)
