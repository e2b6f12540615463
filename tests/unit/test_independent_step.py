"""A step of every preset against a second derivation, in fp64 on transformers, that shares no code with the package."""

from __future__ import annotations

import copy
import math
import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from oreal_megatron.config import AdamWConfig, ModelConfig, parse_config
from oreal_megatron.conversion.huggingface import geometry_of
from oreal_megatron.data.packing import Packer
from oreal_megatron.losses.advantages import select_trajectories
from oreal_megatron.models.reward_model import build_reward_model
from oreal_megatron.models.trained_model import TrainedModel
from oreal_megatron.policy_updates import all_batches, update_policy_in_minibatches, with_batches
from oreal_megatron.step import update_policy, update_reward_model, with_reference, with_token_weights
from oreal_megatron.train import packed, packed_minibatches
from oreal_megatron.types import FinishReason, Grade, GradedRollout, Prompt, Rollout, Verdict, WeightSpan
from tests.tiny_models import VOCABULARY, as_policy, save_tiny

ADAMW = AdamWConfig(lr=1e-3, min_lr=1e-4, warmup_steps=2, decay_steps=10, weight_decay=0.0, betas=(0.9, 0.999),
                    eps=1e-8, clip_grad=1.0)  # fmt: skip
C, W, U = Verdict.CORRECT, Verdict.INCORRECT, Verdict.UNDECIDED
GROUPS = ([C, W, W, C, U], [C, C, C], [W, W, W, W], [C, C, C, W], [C], [U, U], [W, U], [W, W, C, W, W, W])
HEAD = 0.7 * torch.randn(48, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
HEAD_BIAS = 0.13

# What a preset is, in this file's own terms: advantage of a response with reward x among the rewards of its group, the
# groups kept, the responses trained, the terms of correct and incorrect responses, their denominators, eta.
# `reads`: position whose score weighs token t, less t; None: weights of one. `undecided`: reward of such a response.
OREAL = {"advantage": "rloo", "keep": "mixed", "train": "pair", "terms": ("log", "ratio"), "own_counts": True,
         "eta": 0.5, "reads": 0}  # fmt: skip
BASELINE = {"keep": "any", "train": "all", "terms": ("log", "log"), "own_counts": False, "eta": 1.0, "reads": None}
PRESETS = {
    "oreal": OREAL,
    "oreal_change": OREAL | {"weights": "change"},
    "oreal_paper": OREAL | {"advantage": "paper"},
    "oreal_release": OREAL | {"reads": -1, "undecided": -1.0},
    "oreal_no_rm": OREAL | {"train": "all", "reads": None},
    "oreal_release_no_rm": OREAL | {"keep": "two", "train": "all", "reads": None, "undecided": -1.0},
    "reinforce": BASELINE | {"advantage": "raw"},
    "rloo": BASELINE | {"advantage": "rloo", "keep": "two", "terms": ("clip", "clip")},
    "grpo": BASELINE | {"advantage": "grpo", "terms": ("clip", "clip")},
    "raft": BASELINE | {"advantage": "one", "train": "correct"},
    "reinforce_rej": BASELINE | {"advantage": "raw", "keep": "mixed"},
    "psr": BASELINE | {"advantage": "one", "train": "correct", "terms": ("ratio", "ratio")},
    "nsr": BASELINE | {"advantage": "minus_one", "train": "incorrect", "terms": ("ratio", "ratio")},
    "dapo": BASELINE | {"advantage": "grpo", "keep": "mixed", "terms": ("clip_higher", "clip_higher"), "beta": 0.0},
    "dr_grpo": BASELINE | {"advantage": "centred", "terms": ("clip", "clip"), "beta": 0.0, "limit_of_tokens": 64},
    "gspo": BASELINE | {"advantage": "grpo", "terms": ("whole", "whole"), "beta": 0.0},
    "cispo": BASELINE | {"advantage": "grpo", "terms": ("capped", "capped"), "beta": 0.0},
    "grpo_epochs": BASELINE | {"advantage": "grpo", "terms": ("truncated", "truncated")},
    "reinforce_pp": BASELINE | {"advantage": "centred", "normalized": True, "terms": ("clip", "clip"), "kl": "mse"},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directories and fp64 models of transformers: the policy, its reference, and the reward model's decoder."""
    from transformers import AutoModelForCausalLM

    root = tmp_path_factory.mktemp("models")
    paths = {
        name: save_tiny(root / name, "qwen2", tied=False, seed=seed)
        for seed, name in enumerate(("policy", "reference", "reward_model"))
    }
    return paths, {name: AutoModelForCausalLM.from_pretrained(path).double().eval() for name, path in paths.items()}


@pytest.fixture(scope="module")
def groups(models) -> list[list[GradedRollout]]:
    """Groups of all kinds, whose responses another policy drew: ratios to the rollout are clipped here and there."""
    generator, rng, policy = torch.Generator().manual_seed(7), random.Random(3), models[1]["policy"]

    def ids(n):
        return tuple(torch.randint(3, VOCABULARY, (n,), generator=generator).tolist())

    made = []
    for number, verdicts in enumerate(GROUPS):
        prompt, prompt_ids = Prompt(id=f"p{number}", question="q", gold_answer="1"), ids(2 + number)
        made.append([])
        for k, verdict in enumerate(verdicts):
            response = ids(rng.randint(1, 14))
            with torch.no_grad():
                logprobs = logprobs_of(policy, prompt_ids, response)
            noise = 0.3 * torch.randn(len(response), generator=generator, dtype=torch.float64)
            rollout = Rollout(
                prompt=prompt, sample_index=k, prompt_ids=prompt_ids, response_ids=np.asarray(response, np.int32),
                logprobs=(logprobs + noise).float().numpy(), text="", finish_reason=FinishReason.STOP,
                weight_spans=(WeightSpan(version=0, start=0, end=len(response)),),
            )  # fmt: skip
            made[-1].append(GradedRollout(rollout=rollout, grade=Grade(verdict=verdict, reason="", stage="")))
    return made


def logprobs_of(model, prompt_ids, response_ids) -> Tensor:
    logits = model(torch.tensor([[*prompt_ids, *response_ids]])).logits[0]
    rows = logits[len(prompt_ids) - 1 : -1].log_softmax(-1)
    return rows.gather(1, torch.tensor([int(id) for id in response_ids])[:, None])[:, 0]


def advantage(kind: str, reward: float, rewards: list[float]) -> float:
    n, p = len(rewards), sum(x > 0 for x in rewards) / len(rewards)
    mean = sum(rewards) / n
    std = math.sqrt(sum((x - mean) ** 2 for x in rewards) / n)
    return {
        "rloo": lambda: reward - (sum(rewards) - reward) / (n - 1),
        "paper": lambda: 1.0 if reward > 0 else -(1 - p),
        "grpo": lambda: (reward - mean) / (std + 1e-6) if std else 0.0,
        "raw": lambda: reward,
        "centred": lambda: (reward - mean) / 2,
        "one": lambda: 1.0,
        "minus_one": lambda: -1.0,
    }[kind]()


def trained_rows(preset: dict, groups) -> list[tuple[Rollout, bool, float]]:
    """Returns (rollout, whether correct, advantage) of every response that may train."""
    rows = []
    for group in groups:
        rewards = {C: 1.0, W: -1.0} | ({U: preset["undecided"]} if "undecided" in preset else {})
        known = [(graded.rollout, rewards[graded.verdict]) for graded in group if graded.verdict in rewards]
        values = [reward for _, reward in known]
        if not known or (preset["keep"] == "two" and len(known) < 2):
            continue
        if preset["keep"] == "mixed" and len(set(values)) == 1:
            continue
        for rollout, reward in known:
            if {"correct": reward > 0, "incorrect": reward < 0}.get(preset["train"], True):
                rows.append((rollout, reward > 0, advantage(preset["advantage"], reward, values)))
    if preset.get("normalized"):
        values = np.array([value for *_, value in rows])
        rows = [(*row, (value - values.mean()) / values.std()) for *row, value in rows]
    return rows


def derived(preset: dict, rows, models, head_bias: bool, at_start=None) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Returns the losses, and the gradients by `policy.` or `reward_model.` and transformers' name.

    at_start: log-probabilities by rollout id before the step's first update; None: this is the first update.
    """
    for model in models.values():
        model.zero_grad()
    head = HEAD.clone().requires_grad_()
    bias = torch.tensor(HEAD_BIAS if head_bias else 0.0, dtype=torch.float64, requires_grad=True)
    size = {True: 0, False: 0}
    for rollout, correct, _ in rows:
        size[correct] += len(rollout.response_ids)
    total = size[True] + size[False]
    sums, policy_loss, reward_loss, weight_sum = {"positive": 0.0, "negative": 0.0, "kl": 0.0}, 0.0, 0.0, 0.0
    for rollout, correct, value in rows:
        length, start = len(rollout.response_ids), len(rollout.prompt_ids)
        logp = logprobs_of(models["policy"], rollout.prompt_ids, rollout.response_ids)
        with torch.no_grad():
            reference = logprobs_of(models["reference"], rollout.prompt_ids, rollout.response_ids)
        weights = torch.ones(length, dtype=torch.float64)
        if preset["reads"] is not None:
            whole = torch.tensor([[*rollout.prompt_ids, *map(int, rollout.response_ids)]])
            states = models["reward_model"].model(whole).last_hidden_state[0]
            scores = torch.stack([states[start + t + preset["reads"]] @ head + bias for t in range(length)])
            logit = scores.mean()
            reward_loss = reward_loss - F.logsigmoid(logit if correct else -logit) / len(rows)
            before = 0.5
            for t in range(length):
                confidence = 1 / (1 + math.exp(-sum(scores[: t + 1].tolist()) / (t + 1)))
                weights[t] = max(2 * confidence - 1, 0) if correct else max(1 - 2 * confidence, 0)
                if preset.get("weights") == "change":
                    weights[t] = max(confidence - before, 0) if correct else max(before - confidence, 0)
                before = confidence
            if preset.get("weights") == "change" and weights.sum():
                weights *= length / weights.sum()
        weight_sum += weights.sum().item()
        old = torch.tensor(rollout.logprobs, dtype=torch.float64)
        proximal = logp.detach() if at_start is None else at_start[rollout.id]
        moved, correction = (logp - proximal).exp(), (proximal - old).exp().clamp(max=2.0)
        forms = {
            "log": value * logp,
            "ratio": value * torch.exp(logp - logp.detach()),
            "clip": torch.minimum(value * (logp - old).exp(), value * (logp - old).exp().clamp(0.8, 1.2)),
            "clip_higher": torch.minimum(value * (logp - old).exp(), value * (logp - old).exp().clamp(0.8, 1.28)),
            "whole": torch.minimum(
                value * (logp - old).mean().exp(), value * (logp - old).mean().exp().clamp(1 - 3e-4, 1 + 4e-4)
            ).expand(length),
            "truncated": correction * torch.minimum(value * moved, value * moved.clamp(0.8, 1.2)),
            "capped": value * torch.clamp((logp.detach() - old).exp(), max=1.28) * logp,
        }
        count = size[correct] if preset["own_counts"] else len(rows) * preset.get("limit_of_tokens", 0) or total
        term = -(weights * forms[preset["terms"][not correct]]).sum() / count
        sums["positive" if correct else "negative"] += term.item()
        gap = reference - logp
        kl = (gap**2 / 2 if preset.get("kl") == "mse" else gap.exp() - gap - 1).sum() / total
        sums["kl"] += kl.item()
        policy_loss = policy_loss + (term if correct else preset["eta"] * term) + preset.get("beta", 0.01) * kl
    policy_loss.backward()
    gradients = {f"policy.{name}": p.grad for name, p in models["policy"].named_parameters()}
    losses = {f"loss/{name}": value for name, value in sums.items()}
    losses |= {"loss/policy": policy_loss.item(), "policy/token_weight": weight_sum / total}
    if preset["reads"] is not None:
        reward_loss.backward()
        decoder = models["reward_model"].model.named_parameters(prefix="model")
        gradients |= {f"reward_model.{name}": p.grad for name, p in decoder}
        gradients |= {"reward_model.head.weight": head.grad[None], "reward_model.head.bias": bias.grad[None]}
        losses["loss/reward_model"] = reward_loss.item()
    return losses, gradients


def in_megatron(gradients: dict[str, Tensor], model: str) -> dict[str, Tensor]:
    """Returns a model's gradients by Megatron-Core's names; four query heads in two groups, gate above up."""
    of = {name.removeprefix(f"{model}."): value for name, value in gradients.items() if name.startswith(f"{model}.")}
    head = "lm_head" if model == "policy" else "head"
    found = {
        "embedding.word_embeddings.weight": of["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": of["model.norm.weight"],
        "output_layer.weight": of[f"{head}.weight"],
    }
    if "head.bias" in of:
        found["output_layer.bias"] = of["head.bias"]
    for layer in range(2):
        here, there = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        for kind in ("weight", "bias"):
            q, k, v = (of[f"{here}self_attn.{name}_proj.{kind}"].chunk(2) for name in "qkv")
            found[f"{there}self_attention.linear_qkv.{kind}"] = torch.cat([q[0], k[0], v[0], q[1], k[1], v[1]])
        found[f"{there}self_attention.linear_proj.weight"] = of[f"{here}self_attn.o_proj.weight"]
        gate, up = of[f"{here}mlp.gate_proj.weight"], of[f"{here}mlp.up_proj.weight"]
        found[f"{there}mlp.linear_fc1.weight"] = torch.cat([gate, up])
        found[f"{there}mlp.linear_fc2.weight"] = of[f"{here}mlp.down_proj.weight"]
        found[f"{there}input_layernorm.weight"] = of[f"{here}input_layernorm.weight"]
        found[f"{there}pre_mlp_layernorm.weight"] = of[f"{here}post_attention_layernorm.weight"]
    return found


class Recorded(TrainedModel):
    """Keeps the gradients of its update."""

    def update(self) -> dict[str, float]:
        named = self.module.named_parameters()
        self.gradients = {name: p.main_grad.double().clone() for name, p in named if p.requires_grad}
        return super().update()


def step_of(objective, paths, parallel, budget: int):
    """What the package's step reads of a run to pack trajectories."""
    return SimpleNamespace(
        config=SimpleNamespace(
            run=SimpleNamespace(mode="train", seed=0),
            objective=objective,
            rollout=SimpleNamespace(sampling=SimpleNamespace(max_new_tokens=64)),
        ),
        progress=SimpleNamespace(weight_version=0, step=4),
        packer=replace(Packer.of_layout(parallel, geometry_of(paths["policy"]), VOCABULARY), token_budget=budget),
        groups=parallel,
    )


def product_step(objective, paths, groups, parallel, budget: int):
    """Returns metrics, gradients by model, trajectories and the number of micro-batches of a step of the package."""
    policy, reference = (as_policy(paths[name], parallel) for name in ("policy", "reference"))
    geometry = geometry_of(paths["policy"])
    model = ModelConfig(path=str(paths["policy"]), geometry=None, tokenizer="unused", implementation="local",
                        dtype="float32", max_sequence_length=128)  # fmt: skip
    module = build_reward_model(
        geometry, model, parallel, vocab_size=VOCABULARY, seed=0, train_head_bias=objective.train_head_bias
    )
    decoder = as_policy(paths["reward_model"], parallel).state_dict()
    of_decoder = {name: value for name, value in decoder.items() if "output_layer" not in name and value is not None}
    module.load_state_dict(of_decoder, strict=False)
    with torch.no_grad():
        module.output_layer.weight.copy_(HEAD)
        module.output_layer.bias.fill_(HEAD_BIAS if objective.train_head_bias else 0.0)
    trained = {"policy": Recorded(policy, ADAMW, parallel, num_updates=10)}
    selection = select_trajectories(groups, objective, seed=0, step=4, global_rng=random.Random(1))
    run = step_of(objective, paths, parallel, budget)
    counts, batches = packed(run, selection.trajectories)
    batches = with_reference(reference, batches, parallel)
    metrics, scored = {}, None
    if objective.uses_reward_model:
        trained["reward_model"] = Recorded(module, ADAMW, parallel, num_updates=10)
        num_sequences = len(selection.trajectories)
        scored, metrics = update_reward_model(trained["reward_model"], batches, objective, num_sequences=num_sequences)
    batches = with_token_weights(batches, scored, objective, parallel)
    metrics |= update_policy(trained["policy"], batches, objective, counts)
    return metrics, {name: model.gradients for name, model in trained.items()}, selection.trajectories, len(batches)


def test_every_preset_is_derived(composed):
    from tests.unit.test_config import CONF

    assert {path.stem for path in (CONF / "objective").glob("*.yaml")} == {*PRESETS, "baseline"}


@pytest.mark.parametrize("name", PRESETS)
def test_losses_and_gradients_are_those_of_the_derivation(composed, single_process, models, groups, name):
    paths, in_fp64 = models
    objective = parse_config(composed(f"objective={name}")).objective
    rows = trained_rows(PRESETS[name], groups)
    found = {budget: product_step(objective, paths, groups, single_process, budget) for budget in (100_000, 24)}
    assert found[100_000][3] == 1 and found[24][3] > 3
    ids = {trajectory.id for trajectory in found[24][2]}
    if PRESETS[name]["train"] == "pair":
        by_prompt: dict[str, list[bool]] = {}
        for rollout, correct, _ in rows:
            if rollout.id in ids:
                by_prompt.setdefault(rollout.prompt.id, []).append(correct)
        assert len(by_prompt) == len({row[0].prompt.id for row in rows})
        assert all(sorted(pair) == [False, True] for pair in by_prompt.values())
        rows = [row for row in rows if row[0].id in ids]
    assert ids == {rollout.id for rollout, _, _ in rows}
    losses, gradients = derived(PRESETS[name], rows, in_fp64, objective.train_head_bias)
    for metrics, of_model, _, _ in found.values():
        assert {key: metrics[key] for key in losses} == pytest.approx(losses, rel=1e-5, abs=1e-8)
        for model, recorded in of_model.items():
            expected = in_megatron(gradients, model)
            if not objective.train_head_bias:
                expected.pop("output_layer.bias", None)
            assert recorded.keys() == expected.keys()
            largest = max(value.abs().max() for value in expected.values())
            for key, value in expected.items():
                error = (recorded[key][: len(value)] - value).abs().max()
                assert error <= 1e-5 * max(value.abs().max(), 0.01 * largest), f"{model} {key}: {error / largest}"


def hand_written_adamw(model, gradients, moments, update: int, norm_limit: float) -> float:
    """Makes update number `update`, from 1, of the policy by ADAMW's values; returns the gradient's norm."""
    grads = {name: gradients[f"policy.{name}"] for name, _ in model.named_parameters()}
    norm = math.sqrt(sum(float(g.square().sum()) for g in grads.values()))
    scale = min(1.0, norm_limit / (norm + 1e-6))
    # Two updates of warm-up to 1e-3, then a cosine to 1e-4 at update 10.
    rate = 1e-3 * update / 2 if update <= 2 else 1e-4 + 0.45e-3 * (1 + math.cos(math.pi * (update - 2) / 8))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            first, second = moments.setdefault(name, (torch.zeros_like(parameter), torch.zeros_like(parameter)))
            first.mul_(0.9).add_(0.1 * scale * grads[name])
            second.mul_(0.999).add_(0.001 * (scale * grads[name]) ** 2)
            mean, spread = first / (1 - 0.9**update), second / (1 - 0.999**update)
            parameter -= rate * mean / (spread.sqrt() + ADAMW.eps)
    return norm


def test_two_epochs_of_two_minibatches_are_those_of_the_derivation(composed, single_process, models, groups):
    """Four updates of the policy by hand: own denominators of each mini-batch, and one proximal policy for all."""
    paths, in_fp64 = models
    preset, policy = PRESETS["grpo_epochs"], copy.deepcopy(in_fp64["policy"])
    objective = parse_config(composed("objective=grpo_epochs")).objective
    rows = {row[0].id: row for row in trained_rows(preset, groups)}
    with torch.no_grad():
        before = {id: logprobs_of(policy, row[0].prompt_ids, row[0].response_ids) for id, row in rows.items()}
    found = {budget: product_updates(objective, paths, groups, single_process, budget) for budget in (100_000, 24)}
    parts = found[24][2]
    assert sorted(id for part in parts for id in part) == sorted(rows) and parts == found[100_000][2]
    assert abs(len(parts[0]) - len(parts[1])) <= 1
    reports, moments = [], {}
    for update, part in enumerate(parts * 2, start=1):
        chosen = [rows[id] for id in part]
        losses, gradients = derived(preset, chosen, {**in_fp64, "policy": policy}, head_bias=True, at_start=before)
        reports.append(losses | {"policy/grad_norm": hand_written_adamw(policy, gradients, moments, update, 1.0)})
    expected = in_megatron({f"policy.{name}": p.detach() for name, p in policy.named_parameters()}, "policy")
    start = in_megatron({f"policy.{name}": p.detach() for name, p in in_fp64["policy"].named_parameters()}, "policy")
    for metrics, trained, _ in found.values():
        means = {key: sum(report[key] for report in reports) / 4 for key in reports[0]}
        assert {key: metrics[key] for key in means} == pytest.approx(means, rel=2e-4, abs=1e-7)
        assert metrics["policy/updates"] == 4 and metrics["policy/outside_clip"] > 0
        for name, parameter in trained.module.named_parameters():
            moved = expected[name] - start[name]
            error = parameter.detach().double()[: len(moved)] - expected[name]
            # AdamW moves by the sign of gradients that are nearly zero, where rounding decides.
            assert error.norm() <= 2e-3 * moved.norm() + 1e-6, f"{name}: {error.norm() / moved.norm()}"


def product_updates(objective, paths, groups, parallel, budget: int):
    """Returns metrics and policy of the package's updates of a step, and the ids of its mini-batches."""
    policy, reference = (as_policy(paths[name], parallel) for name in ("policy", "reference"))
    trained = TrainedModel(policy, ADAMW, parallel, num_updates=10)
    selection = select_trajectories(groups, objective, seed=0, step=4, global_rng=random.Random(1))
    run = step_of(objective, paths, parallel, budget)
    minibatches = packed_minibatches(run, selection.trajectories)
    batches = with_reference(reference, all_batches(minibatches), parallel)
    minibatches = with_batches(minibatches, with_token_weights(batches, None, objective, parallel))
    metrics = update_policy_in_minibatches(trained, minibatches, objective)
    return metrics, trained, [sorted(id for batch in some for id in batch.ids) for _, some in minibatches]
