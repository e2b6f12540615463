"""Supervised warm start on worked solutions, on the same Megatron stack as the policy."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from oreal_megatron.config import SftConfig
from oreal_megatron.data.arithmetic import Demonstration
from oreal_megatron.data.packing import PackedSequence, Packer, TokenBatch
from oreal_megatron.data.prompting import PromptRenderer
from oreal_megatron.distributed.groups import ParallelGroups
from oreal_megatron.models.trained_model import TrainedModel
from oreal_megatron.seeds import derive_seed


def warm_start(
    model: TrainedModel,
    demonstrations: Sequence[Demonstration],
    renderer: PromptRenderer,
    config: SftConfig,
    groups: ParallelGroups,
    packer: Packer,
    *,
    seed: int,
    on_step: Callable[[int, float], None],
) -> None:
    """Trains on the responses' tokens by maximum likelihood. on_step: (step, mean negative log-likelihood in nats)."""
    batches = _batches(demonstrations, config.batch_size, seed)
    for step, batch in zip(range(config.steps), batches, strict=False):
        chosen = [
            PackedSequence(
                id=f"demonstration of {demonstration.question!r}",
                prompt_ids=renderer.question_ids(demonstration.question),
                response_ids=renderer.response_ids(demonstration.response),
            )
            for demonstration in batch
        ]
        num_tokens = sum(len(sequence.response_ids) for sequence in chosen)

        def negative_log_likelihood(output: Tensor, batch: TokenBatch) -> tuple[Tensor, float]:
            loss = -output[batch.predicting, 0].sum() / num_tokens  # noqa: B023 (called within this iteration)
            return loss, loss.item()

        losses = model.forward_backward(packer.batches(chosen), negative_log_likelihood)
        try:
            model.update()
        except FloatingPointError as error:
            raise FloatingPointError(
                f"warm start, step {step}: {error} (losses {losses}); lower sft.optimizer.lr"
            ) from error
        on_step(step, groups.sum_over_data(torch.tensor(sum(losses))).item())


def _batches(demonstrations: Sequence[Demonstration], size: int, seed: int) -> Iterator[list[Demonstration]]:
    """Batches without end: epoch after epoch, each in an order of its own."""

    def in_order() -> Iterator[Demonstration]:
        for epoch in itertools.count():
            order = list(demonstrations)
            random.Random(derive_seed(seed, "sft", epoch)).shuffle(order)
            yield from order

    endless = in_order()
    while True:
        yield list(itertools.islice(endless, size))
