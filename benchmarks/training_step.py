"""The policy's update against bare Megatron-Core on the same packed tokens.

Bare: the same layers in a plain GPTModel with its stock cross-entropy, Megatron-Core's schedule and optimizer.
Ours adds the chunked log-probabilities, entropy, the objective's terms, checks and metrics.

    python -m benchmarks.training_step [--pairs 7]
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel

from benchmarks.pairs import compare
from oreal_megatron import updates
from oreal_megatron.cli import config_directory
from oreal_megatron.config import (
    AdamWConfig,
    GeometryConfig,
    ModelConfig,
    ObjectiveConfig,
    ParallelConfig,
    parse_config,
)
from oreal_megatron.data.packing import IGNORE, PackedSequence, TokenBatch, micro_batches
from oreal_megatron.models.architecture import build_gpt
from oreal_megatron.models.optimizer import TrainedModel
from oreal_megatron.models.policy import Policy
from oreal_megatron.objective.terms import TokenCounts
from oreal_megatron.parallel.device import device_seam
from oreal_megatron.parallel.groups import ParallelGroups, parallel_groups

VOCABULARY = 4096
ADAMW = AdamWConfig(
    lr=1e-5,
    min_lr=1e-6,
    warmup_steps=1,
    decay_steps=None,
    weight_decay=0.01,
    betas=(0.9, 0.999),
    eps=1e-8,
    clip_grad=1.0,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7)
    arguments = parser.parse_args()
    parallel = ParallelConfig(tensor=1, pipeline=1, micro_batch_tokens=2048)
    with device_seam(), parallel_groups(parallel, seed=0) as groups:
        batches = token_batches(parallel.micro_batch_tokens)
        objective = oreal_objective()
        policy, bare = trained(Policy, groups), trained(GPTModel, groups)
        counts = TokenCounts(*(sum(int((b.per_token(b.correct) == c).sum()) for b in batches) for c in (True, False)))

        def plain_update() -> None:
            def cross_entropy(output: torch.Tensor, batch: TokenBatch) -> tuple[torch.Tensor, None]:
                return (output[0] * (batch.labels[0] != IGNORE)).sum() / counts.all, None

            bare.forward_backward([replace(b, labels=b.labels.clamp(min=0)) for b in batches], cross_entropy)
            bare.schedule.step(1)
            bare.optimizer.step()

        ours, peer, ratio = compare(
            lambda: updates.update_policy(policy, batches, objective, counts), plain_update, pairs=arguments.pairs
        )
    tokens = sum(batch.tokens.size(1) for batch in batches)
    print(f"{tokens} tokens in {len(batches)} micro-batches, {counts.all} of them response tokens")
    print(f"policy update  {ours:.3f} s\nbare Megatron  {peer:.3f} s")
    print(f"ours takes {ratio:.2f} x the time of bare Megatron-Core (median of {arguments.pairs} pairs; aim: 1.10)")


def oreal_objective() -> ObjectiveConfig:
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    with initialize_config_dir(str(config_directory()), version_base="1.3"):
        raw: Any = OmegaConf.to_container(compose("config", overrides=["run.name=benchmark"]), resolve=True)
    return parse_config(raw).objective


def trained(cls: type[GPTModel], groups: ParallelGroups) -> TrainedModel:
    geometry = GeometryConfig(
        num_layers=6, hidden_size=256, ffn_hidden_size=704, num_attention_heads=8, num_query_groups=2
    )
    model = ModelConfig(
        path=None,
        geometry=geometry,
        tokenizer="arithmetic",
        implementation="local",
        dtype="float32",
        max_sequence_length=1024,
    )
    module = build_gpt(cls, geometry, model, groups, vocab_size=VOCABULARY, seed=0, tied_embeddings=False)
    return TrainedModel(module, ADAMW, groups, num_updates=1000)


def token_batches(token_budget: int) -> list[TokenBatch]:
    """24 sequences of 64 to 512 tokens, an eighth of each its prompt."""
    generator = torch.Generator().manual_seed(0)
    sequences = []
    for index in range(24):
        ids = torch.randint(0, VOCABULARY, (64 + 448 * index // 23,), generator=generator).tolist()
        split = len(ids) // 8
        sequences.append(
            PackedSequence(
                id=str(index),
                prompt_ids=tuple(ids[:split]),
                response_ids=tuple(ids[split:]),
                correct=index % 2 == 0,
                advantage=1.0 if index % 2 == 0 else -1.0,
                rollout_logprobs=(-8.0,) * (len(ids) - split),
            )
        )
    return [
        replace(b, reference_logprobs=b.rollout_logprobs, token_weights=torch.ones_like(b.rollout_logprobs))
        for b in micro_batches(sequences, token_budget, torch.device("cpu"))
    ]


if __name__ == "__main__":
    main()
