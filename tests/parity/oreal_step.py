"""Two steps of fine-tuning and of OREAL on tiny models, and everything that they compute, by names of the network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from oreal_megatron.checkpoint.state import load_trained, trained_state
from oreal_megatron.checkpoint.store import CheckpointStore, step_name
from oreal_megatron.config import AdamWConfig, GeometryConfig, ModelConfig, ObjectiveConfig
from oreal_megatron.data.packing import PackedSequence, Packer
from oreal_megatron.distributed.cpu_backend import device
from oreal_megatron.distributed.groups import ParallelGroups
from oreal_megatron.losses.policy_terms import TokenCounts
from oreal_megatron.models.initialization import name_in_network, part_of
from oreal_megatron.models.kv_decoder import CachedDecoder
from oreal_megatron.models.offload import FrozenModel
from oreal_megatron.models.policy import build_policy
from oreal_megatron.models.reward_model import build_reward_model
from oreal_megatron.models.trained_model import TrainedModel
from oreal_megatron.models.virtual_stages import chunks_of
from oreal_megatron.policy_updates import (
    all_batches,
    split_into_minibatches,
    update_policy_in_minibatches,
    with_batches,
)
from oreal_megatron.step import update_reward_model, with_reference, with_token_weights
from oreal_megatron.supervised import update_supervised

VOCABULARY = 105  # odd: every tensor split has rows of padding
NUM_STEPS = 2
# Biases and norms of queries and keys: tensor ranks hold parts of the first, and each a part of the second's gradient.
GEOMETRY = GeometryConfig(
    num_layers=4, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4, num_query_groups=2, init_std=0.2,
    qkv_bias=True, qk_norm=True,
)  # fmt: skip
MODEL = ModelConfig(
    path=None, geometry=GEOMETRY, tokenizer="arithmetic", implementation="local", dtype="float32",
    max_sequence_length=64, logprob_chunk_tokens=5,
)  # fmt: skip
# At an epsilon of 1e-8 the first updates of AdamW are the signs of gradients: they make whole steps of rounding.
ADAMW = AdamWConfig(
    lr=1e-3, min_lr=1e-4, warmup_steps=0, decay_steps=10, weight_decay=0.01, betas=(0.9, 0.999), eps=1e-4,
    clip_grad=0.1,
)  # fmt: skip


@dataclass
class Outcome:
    """What two steps gave; tensors by name in the network, on the CPU, so that other processes can read them."""

    metrics: list[dict[str, float]] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    """Before clipping; left out under the distributed optimizer, whose ranks hold pieces of a flat buffer."""
    weights: dict[str, Tensor] = field(default_factory=dict)
    generation: Tensor = field(default_factory=lambda: torch.zeros(0))
    """[3, 4, V] log-probabilities that the updated policy continues three prompts with."""


class Recorded(TrainedModel):
    """Keeps the gradients that each update is given."""

    def update(self) -> dict[str, float]:
        self.gradients = {name: on_cpu(p.main_grad) for name, _, p in named(self)}
        return super().update()


def on_cpu(tensor: Tensor) -> Tensor:
    """A copy, which later updates do not change."""
    return tensor.detach().to("cpu", copy=True)


def named(model: TrainedModel) -> list[tuple[str, str, Any]]:
    """(name in the network, name in its chunk, parameter) of all parameters of this rank."""
    return [
        (name_in_network(chunk, name), name, parameter)
        for chunk in chunks_of(model.module)
        for name, parameter in chunk.named_parameters()
    ]


def run_steps(
    groups: ParallelGroups,
    objective: ObjectiveConfig,
    *,
    tied: bool,
    num_sequences: int,
    model: ModelConfig = MODEL,
    steps: range = range(NUM_STEPS),
    checkpoints: Path | None = None,
) -> tuple[Outcome, dict[str, tuple[str, Any]]]:
    """Steps from the initial weights, or the second alone from the checkpoint of the first; what they computed, and
    (name in its chunk, parameter) by name in the network.

    checkpoints: where the first step's checkpoint is, or goes to, while the second step runs.
    """

    geometry = GEOMETRY.model_copy(update={"tied_embeddings": tied})
    modules = [build_policy(geometry, model, groups, vocab_size=VOCABULARY, seed=seed) for seed in (0, 1)]
    policy = Recorded(modules[0], ADAMW, groups, num_updates=10)
    reward_model = Recorded(scoring_reward_model(model, groups), ADAMW, groups, num_updates=10)
    reference = FrozenModel(modules[1], offload=groups.layout.offload)
    trained = {"policy": policy, "reward_model": reward_model}
    store = CheckpointStore(checkpoints, groups, keep=1) if checkpoints else None
    if store and steps.start:
        restore(store, trained, steps.start)
    for each in (policy, reward_model, reference):
        each.offload()
    chosen = sequences(num_sequences)
    outcome = Outcome()
    for step in steps:
        packer = Packer.of_layout(groups, GEOMETRY, VOCABULARY, can_share_prompts=True)
        with policy.on_device():
            fine_tuned = update_supervised(policy, conversations(chosen), packer)
        minibatches = [
            (counts_of(part), packer.batches(part))
            for part in split_into_minibatches(chosen, objective.updates.minibatches, seed=step)
        ]
        batches = all_batches(minibatches)
        with reference.on_device():
            batches = with_reference(reference.module, batches, groups)
        with reward_model.on_device():
            scored, metrics = update_reward_model(reward_model, batches, objective, num_sequences=len(chosen))
        batches = with_token_weights(batches, scored, objective, groups)
        with policy.on_device():
            metrics |= update_policy_in_minibatches(policy, with_batches(minibatches, batches), objective)
        metrics |= {f"fine_tuning/{name}": value for name, value in fine_tuned.items()}
        outcome.metrics.append(metrics)
        if not groups.layout.distributed_optimizer:
            outcome.gradients.append(
                {f"{prefix}.{n}": g for prefix, each in trained.items() for n, g in each.gradients.items()}
            )
        if store and step + 1 < NUM_STEPS:
            with policy.on_device(states=True), reward_model.on_device(states=True):
                state = {k: v for prefix, each in trained.items() for k, v in trained_state(prefix, each).items()}
                store.save(step_name(step + 1), state, wait=False)
    if store:
        store.finish(wait=True)
    parameters = {
        f"{prefix}.{name}": (local, parameter)
        for prefix, each in trained.items()
        for name, local, parameter in named(each)
    }
    with policy.on_device(), reward_model.on_device():
        outcome.weights = {name: on_cpu(parameter) for name, (_, parameter) in parameters.items()}
        outcome.generation = on_cpu(continuations(policy.module, groups))
    return outcome, parameters


def counts_of(chosen: Sequence[PackedSequence]) -> TokenCounts:
    correct, incorrect = (
        sum(s.num_trained_tokens for s in chosen if s.correct is outcome) for outcome in (True, False)
    )
    return TokenCounts(correct=correct, incorrect=incorrect, limit=0)


def scoring_reward_model(model: ModelConfig, groups: ParallelGroups) -> Any:
    """Builds a reward model with a random head: a head of zeros would give token weights of zeros."""
    module = build_reward_model(GEOMETRY, model, groups, vocab_size=VOCABULARY, seed=0)
    for chunk in chunks_of(module):
        if chunk.post_process:
            head = torch.randn(1, GEOMETRY.hidden_size, generator=torch.Generator().manual_seed(3))
            chunk.output_layer.weight.data.copy_(head)
    return module


def conversations(chosen: Sequence[PackedSequence]) -> list[PackedSequence]:
    """The sequences with turns that are not trained: every third token from the first, as long as there are others."""
    return [
        PackedSequence(
            id=one.id,
            prompt_ids=one.prompt_ids,
            response_ids=one.response_ids,
            loss_mask=np.arange(len(one.response_ids)) % 3 > 0,
        )
        for one in chosen
    ]


def restore(store: CheckpointStore, trained: dict[str, Recorded], step: int) -> None:
    wanted = {
        key: value
        for prefix, model in trained.items()
        for key, value in trained_state(prefix, model, is_loading=True).items()
    }
    state = store.load(step_name(step), wanted)
    for prefix, model in trained.items():
        load_trained(prefix, model, state)


def continuations(policy: Any, groups: ParallelGroups) -> Tensor:
    decoder = CachedDecoder(policy, groups, VOCABULARY)
    logits = [decoder.prefill([(5, 6, 7), (8,), (9, 10)], max_new_tokens=4)]
    logits += [decoder.step(torch.tensor([11, 12, 13], device=device()) + step) for step in range(3)]
    return torch.stack(logits, dim=1).log_softmax(-1)


def sequences(count: int) -> list[PackedSequence]:
    """Lengths from 4 to 28; the rollout's log-probabilities are not the policy's. Every third has inserted tokens.

    The first has a prompt of one token, the next four a prompt of 11 and the others one of 7: with the token budget
    of `PACKED`, some row of every layout shares a prompt, except under context parallelism.
    """
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, VOCABULARY, (length,), generator=generator).tolist())

    prompts = [ids(1), *[ids(11)] * 4, *[ids(7)] * count]
    made = []
    for i in range(count):
        length = 3 + 3 * i
        mask = None if i % 3 != 1 else ~np.isin(np.arange(length), (1, 7, 8, 9))
        made.append(
            PackedSequence(
                id=str(i),
                prompt_ids=prompts[i],
                response_ids=ids(length),
                correct=i % 2 == 0,
                advantage=1.0 if i % 2 == 0 else -0.5,
                rollout_logprobs=(-1.0,) * (length if mask is None else int(mask.sum())),
                loss_mask=mask,
            )
        )
    return made


def differences(
    mine: Outcome, parameters: dict[str, tuple[str, Any]], one: Outcome, groups: ParallelGroups
) -> dict[str, Any]:
    """The largest differences of this rank from one rank's outcome, each with where it is.

    Compared are as many last steps as `mine` has. metrics: relative. gradients: relative to the tensor's largest entry.
    weights, generation: absolute.
    """

    def part(name: str, whole: Tensor) -> Tensor:
        local, parameter = parameters[name]
        if local.endswith(("word_embeddings.weight", "output_layer.weight")):
            whole = whole[:VOCABULARY]
        return part_of(local, whole, parameter, groups)

    first = len(one.metrics) - len(mine.metrics)
    assert mine.metrics and all(m.keys() == o.keys() for m, o in zip(mine.metrics, one.metrics[first:], strict=True))
    metrics = [
        (abs(m[name] - o[name]) / max(abs(o[name]), 1e-3), f"step {step} {name}: {m[name]:.9g}, not {o[name]:.9g}")
        for step, (m, o) in enumerate(zip(mine.metrics, one.metrics[first:], strict=True), first)
        for name in o
    ]
    # Gradients of which nearly everything cancels are rounding: none is held to less than a hundredth of the largest.
    floors = [0.01 * max(map(_largest, gradients.values())) for gradients in one.gradients]
    gradients = [
        (_largest(g - part(name, o[name])) / max(_largest(o[name]), floors[step]), f"step {step} {name}")
        for step, (m, o) in enumerate(zip(mine.gradients, one.gradients[first:], strict=False), first)
        for name, g in m.items()
    ]
    weights = [(_largest(w - part(name, one.weights[name])), name) for name, w in mine.weights.items()]
    return {
        "metrics": max(metrics),
        "gradients": max(gradients, default=(0.0, "")),
        "weights": max(weights),
        "generation": (_largest(mine.generation - one.generation), "log-probabilities"),
    }


def _largest(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0
