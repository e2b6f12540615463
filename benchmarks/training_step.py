"""A training step of the three models against bare Megatron-Core on the same packed micro-batches.

Bare: Megatron-Core's schedule and optimizer called directly: forward of a reference, forward, backward and update of
a policy with the stock cross-entropy, and of a reward model with a sum of its scores. Ours is the whole OREAL step:
chunked log-probabilities, entropy, both losses, token weights, checks and metrics.

    python -m benchmarks.training_step                                        one process
    torchrun --standalone --nproc-per-node 4 -m benchmarks.training_step --tensor 2 --pipeline 2
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from benchmarks.model import GEOMETRY, VOCABULARY, bare_model_of, policy_of, reward_model_of, trained
from benchmarks.pairs import compare
from oreal_megatron.compose import composed, resolved
from oreal_megatron.config import ObjectiveConfig, ParallelConfig, parse_config
from oreal_megatron.data.packing import IGNORE, PackedSequence, Packer, TokenBatch
from oreal_megatron.distributed.cpu_backend import cpu_backend, device
from oreal_megatron.distributed.groups import ParallelGroups, parallel_groups
from oreal_megatron.losses.policy_terms import TokenCounts
from oreal_megatron.models.packed_row import packed_row
from oreal_megatron.step import update_policy, update_reward_model, with_reference, with_token_weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--pipeline", type=int, default=1)
    parser.add_argument("--sequences", type=int, default=24)
    arguments = parser.parse_args()
    layout = ParallelConfig(tensor=arguments.tensor, pipeline=arguments.pipeline, micro_batch_tokens=2048)
    with cpu_backend(), parallel_groups(layout, seed=0) as groups:
        chosen = sequences(arguments.sequences)
        batches = Packer.of_layout(groups, GEOMETRY, VOCABULARY).batches(chosen)
        ours, bare = oreal_step(batches, chosen, groups), bare_step(batches, chosen, groups)
        mine, peer, ratio = compare(ours, bare, pairs=arguments.pairs)
        if groups.is_main:
            tokens = sum(sequence.num_tokens for sequence in chosen)
            print(f"TP{layout.tensor} x PP{layout.pipeline}: {tokens} tokens in {len(batches)} micro-batches")
            print(f"OREAL step     {mine:.3f} s\nbare Megatron  {peer:.3f} s")
            print(f"ours takes {ratio:.2f} x the time of bare Megatron-Core ({arguments.pairs} pairs; aim: 1.10)")


def oreal_step(batches: list[TokenBatch], chosen: list[PackedSequence], groups: ParallelGroups) -> Callable[[], None]:
    objective = oreal_objective()
    policy, reward_model = trained(policy_of(groups), groups), trained(reward_model_of(groups), groups)
    reference = policy_of(groups)
    counts = TokenCounts(*(sum(len(s.response_ids) for s in chosen if s.correct is c) for c in (True, False)), limit=0)

    def step() -> None:
        scored = with_reference(reference, batches, groups)
        scores, _ = update_reward_model(reward_model, scored, objective, num_sequences=len(chosen))
        update_policy(policy, with_token_weights(scored, scores, objective, groups), objective, counts)

    return step


def bare_step(batches: list[TokenBatch], chosen: list[PackedSequence], groups: ParallelGroups) -> Callable[[], None]:
    policy, reward_model = trained(bare_model_of(groups), groups), trained(reward_model_of(groups), groups)
    reference = bare_model_of(groups)
    # The stock loss has no ignored labels, and takes them all: of every token, as ours for the response's only.
    labelled = [replace(batch, labels=batch.labels.clamp(min=0)) for batch in batches]
    masks = {id(batch): old.labels[0] != IGNORE for batch, old in zip(labelled, batches, strict=True)}
    num_tokens = sum(len(sequence.response_ids) for sequence in chosen)

    def run(model: Any, loss: Callable[[Tensor, Tensor], Tensor], *, forward_only: bool) -> None:
        def forward_step(rows: Iterator[TokenBatch], model: Any) -> Any:
            batch = next(rows)
            packed = packed_row(batch, batch.positions[0])
            output = model(batch.tokens, batch.positions, None, labels=batch.labels, packed_seq_params=packed)
            one = torch.ones((), dtype=torch.int, device=device())
            return output, lambda output: (loss(output, masks[id(batch)]) / num_tokens, one, None)

        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(labelled),
            model=model,
            num_microbatches=len(labelled),
            seq_length=labelled[0].tokens.size(1),
            micro_batch_size=1,
            forward_only=forward_only,
        )

    def step() -> None:
        with torch.no_grad():
            run(reference, lambda output, mask: output.sum(), forward_only=True)
        for model, loss in (
            (reward_model, lambda output, mask: (output[0, :, 0] * mask).sum()),
            (policy, lambda output, mask: (output[0] * mask).sum()),
        ):
            model.chunks[0].zero_grad_buffer()
            model.optimizer.zero_grad()
            run(model.chunks[0], loss, forward_only=False)
            model.schedule.step(1)
            model.optimizer.step()

    return step


def oreal_objective() -> ObjectiveConfig:
    return parse_config(resolved(composed(["run.name=benchmark"]))).objective


def sequences(count: int) -> list[PackedSequence]:
    """From 64 to 512 tokens, an eighth of each its prompt."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for index in range(count):
        ids = torch.randint(0, VOCABULARY, (64 + 448 * index // (count - 1),), generator=generator).tolist()
        split = len(ids) // 8
        made.append(
            PackedSequence(
                id=str(index),
                prompt_ids=tuple(ids[:split]),
                response_ids=tuple(ids[split:]),
                correct=index % 2 == 0,
                advantage=1.0 if index % 2 == 0 else -1.0,
                rollout_logprobs=(-8.0,) * (len(ids) - split),
            )
        )
    return made


if __name__ == "__main__":
    main()
