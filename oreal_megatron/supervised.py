"""Computations of supervised fine-tuning: an update by maximum likelihood, and the loss of held-out records."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from oreal_megatron.data.packing import PackedSequence, Packer, TokenBatch
from oreal_megatron.distributed.groups import ParallelGroups
from oreal_megatron.models.pipeline_schedule import score
from oreal_megatron.models.trained_model import TrainedModel


def update_supervised(model: TrainedModel, sequences: Sequence[PackedSequence], packer: Packer) -> dict[str, float]:
    """Makes one update on sequences of the main rank. Returns `section/name` metrics over all ranks.

    `loss/nll` is the mean negative log-likelihood of the trained tokens, in nats.

    Raises:
        FloatingPointError: the gradient norm is not finite; no update was made.
    """
    num_sequences, num_tokens, num_trained = _counts(sequences, model.groups)

    def negative_log_likelihood(output: Tensor, batch: TokenBatch) -> tuple[Tensor, float]:
        loss = -output[batch.predicting, 0].sum() / num_trained
        return loss, loss.item()

    losses = model.forward_backward(packer.batches_from_main(sequences, model.groups), negative_log_likelihood)
    nll = model.groups.sum_over_data(torch.tensor(sum(losses))).item()
    try:
        update = model.update()
    except FloatingPointError as error:
        raise FloatingPointError(f"{error}, at a loss of {nll:g} nats a token") from error
    return {
        "loss/nll": nll,
        "sft/conversations": float(num_sequences),
        "sft/tokens": float(num_tokens),
        "sft/trained_tokens": float(num_trained),
        **{f"policy/{name}": value for name, value in update.items()},
    }


def heldout_metrics(
    module: torch.nn.Module, sequences: Sequence[PackedSequence], packer: Packer, groups: ParallelGroups
) -> dict[str, float]:
    """Returns the loss of held-out sequences of the main rank, in nats a trained token, and their numbers."""
    *_, num_trained = _counts(sequences, groups)
    batches = packer.batches_from_main(sequences, groups)
    sums = score(module, batches, lambda output, batch: output[batch.predicting, 0].double().sum().cpu(), groups)
    total = groups.sum_over_data(torch.stack(sums).sum()).item()
    return {"sft/heldout_loss": -total / num_trained, "sft/heldout_tokens": float(num_trained)}


def _counts(sequences: Sequence[PackedSequence], groups: ParallelGroups) -> tuple[int, int, int]:
    """Returns the number of the main rank's sequences, of their tokens and of their trained tokens, on every rank."""
    num_tokens, num_trained = (sum(s.num_tokens for s in sequences), sum(s.num_trained_tokens for s in sequences))
    return groups.from_main((len(sequences), num_tokens, num_trained))
