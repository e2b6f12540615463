"""The check of an objective of one's own: what a trainer needs of it whatever the layout and the batch."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from oreal_megatron.compose import composed, validated
from oreal_megatron.config import ConfigError, ObjectiveConfig
from oreal_megatron.extensions import check_functions, objective_function
from oreal_megatron.losses.advantages import group_advantages, is_useful, select_trajectories
from oreal_megatron.losses.policy_terms import TokenCounts, policy_terms
from oreal_megatron.losses.token_weights import token_weights
from oreal_megatron.types import FinishReason, Grade, GradedRollout, Prompt, Rollout, Verdict, WeightSpan

_LENGTHS = (5, 1, 7, 2, 1, 4)
"""Response tokens of the sequences of a check; one has a single token."""
_ADVANTAGES = (0.7, -1.3, 1.1, -0.4, 0.9, -0.6)
"""Advantages of the sequences; those of correct responses are positive."""
_COUNTS = TokenCounts(
    correct=sum(length for length, a in zip(_LENGTHS, _ADVANTAGES, strict=True) if a > 0),
    incorrect=sum(length for length, a in zip(_LENGTHS, _ADVANTAGES, strict=True) if a < 0),
    limit=8 * len(_LENGTHS),
)
_STEP = 1e-6
"""Step of the central differences, in nats."""
_NAMES = ("reference_logprobs_R", "old_logprobs_R", "rollout_logprobs_R", "weights_R", "advantages_R", "correct_R")

Values = dict[str, Tensor]
"""Inputs of a policy loss by the names of its keyword arguments, fp64 [R] (correct_R: bool [R])."""


def check_objective(
    overrides: Sequence[str],
    *,
    reads: Literal["token", "sequence"] = "token",
    config_dir: Path | None = None,
    seed: int = 0,
) -> None:
    """Checks the objective that overrides of `oreal-train` compose, on random responses, in fp64 on the CPU.

    - The gradient of the loss is that of its value, by central differences. What an objective holds constant on purpose
      it takes from `detached_logprobs_R` or `old_logprobs_R`.
    - The loss is the same sum for every split into micro-batches, and so for every split over data-parallel ranks.
    - A sequence's losses do not depend on the order of sequences or on tokens of others. With `reads="token"`, which an
      objective of ratios of whole sequences does not fulfil, a token's loss depends on that token's values alone.
    - Responses of one token, and micro-batches without responses, give finite losses.
    - Advantages, groups that train and token weights are the same at every call, and follow the order of responses.

    reads: values that a token's loss may depend on: its own, or those of its sequence.

    Raises:
        ConfigError: the overrides are no valid configuration.
        AssertionError: a check fails. The message has all that fail.
    """
    run = validated(composed([*overrides], config_dir=config_dir))
    if violations := check_functions(run):
        raise ConfigError(violations)
    config = run.objective
    values = _random_values(seed)
    faults = [
        *_faults_of_gradient(config, values),
        *_faults_of_splits(config, values),
        *_faults_of_dependence(config, values, reads),
        *_faults_of_small_batches(config, values),
        *_faults_of_groups(config, seed),
        *_faults_of_token_weights(config, seed),
    ]
    assert not faults, "the objective fails:\n" + "\n".join(f"  - {fault}" for fault in faults)


def _random_values(seed: int) -> Values:
    generator = torch.Generator().manual_seed(seed)

    def drawn(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(sum(_LENGTHS), generator=generator, dtype=torch.float64)

    logprobs_R = drawn(-3.0, -0.1)
    advantages_R = torch.tensor(_ADVANTAGES, dtype=torch.float64).repeat_interleave(torch.tensor(_LENGTHS))
    return {
        "logprobs_R": logprobs_R,
        "reference_logprobs_R": logprobs_R + drawn(-0.5, 0.5),
        "rollout_logprobs_R": logprobs_R + drawn(-0.15, 0.15),
        "weights_R": drawn(0.1, 1.0),
        "old_logprobs_R": logprobs_R + drawn(-0.15, 0.15),
        "advantages_R": advantages_R,
        "correct_R": advantages_R > 0,
    }


def _loss(
    config: ObjectiveConfig, values: Values, lengths: Sequence[int], *, detached_R: Tensor | None = None
) -> Tensor:
    """Returns a micro-batch's share of the loss of all sequences. detached_R: see `policy_terms`."""
    return policy_terms(config, **values, lengths=lengths, detached_logprobs_R=detached_R).loss(_COUNTS, config)


def _sequences(values: Values, order: Sequence[int]) -> tuple[Values, tuple[int, ...]]:
    """Returns the values of some sequences, in this order, and their lengths."""
    parts = {name: value.split(_LENGTHS) for name, value in values.items()}
    empty = {name: value[:0] for name, value in values.items()}
    chosen = {name: torch.cat([empty[name], *(part[index] for index in order)]) for name, part in parts.items()}
    return chosen, tuple(_LENGTHS[index] for index in order)


def _gradient(config: ObjectiveConfig, values: Values, lengths: Sequence[int]) -> Tensor:
    """Returns the gradient of a micro-batch's share by logprobs_R, fp64 [R]."""
    leaf = values["logprobs_R"].clone().requires_grad_()
    loss = _loss(config, {**values, "logprobs_R": leaf}, lengths)
    return torch.autograd.grad(loss + 0.0 * leaf.sum(), leaf)[0]


def _faults_of_gradient(config: ObjectiveConfig, values: Values) -> list[str]:
    analytic = _gradient(config, values, _LENGTHS)
    base = values["logprobs_R"]
    differences = torch.empty_like(base)
    for index in range(len(base)):
        moved = torch.zeros_like(base)
        moved[index] = _STEP
        above, below = (
            _loss(config, {**values, "logprobs_R": base + sign * moved}, _LENGTHS, detached_R=base) for sign in (1, -1)
        )
        differences[index] = (above - below) / (2 * _STEP)
    error = (analytic - differences).abs().max().item()
    if error <= 1e-6 * max(1.0, differences.abs().max().item()):
        return []
    worst = int((analytic - differences).abs().argmax())
    return [
        f"the gradient is not that of the loss: {analytic[worst].item():.6g} at token {worst}, where differences of "
        f"the loss give {differences[worst].item():.6g}. Something that logprobs_R enters is detached; take what is "
        "held constant from detached_logprobs_R, or from old_logprobs_R"
    ]


def _faults_of_splits(config: ObjectiveConfig, values: Values) -> list[str]:
    whole = _loss(config, values, _LENGTHS).item()
    gradient = _gradient(config, values, _LENGTHS)
    faults = []
    for name, split in (
        ("one micro-batch for each sequence", [[index] for index in range(len(_LENGTHS))]),
        ("two micro-batches", [[0, 1, 2], [3, 4, 5]]),
        ("sequences in another order", [[4, 2, 5, 0, 3, 1]]),
    ):
        total, parts = 0.0, [torch.empty(0, dtype=torch.float64)] * len(_LENGTHS)
        for order in split:
            chosen, lengths = _sequences(values, order)
            total += _loss(config, chosen, lengths).item()
            for index, part in zip(order, _gradient(config, chosen, lengths).split(lengths), strict=True):
                parts[index] = part
        error = (torch.cat(parts) - gradient).abs().max().item()
        if abs(total - whole) > 1e-9 * max(1.0, abs(whole)) or error > 1e-9:
            faults.append(
                f"{name}: the loss is {total:.9g} and was {whole:.9g} in one micro-batch, and gradients differ by "
                f"{error:.3g}. Return a loss for each token, not divided by a number that depends on the micro-batch"
            )
    return faults


def _faults_of_dependence(config: ObjectiveConfig, values: Values, reads: str) -> list[str]:
    """Compares the losses of tokens before and after values of one token or sequence change."""
    faults: list[str] = []
    by_token = _losses_by_token(config)
    if by_token is None:
        return []
    base = by_token(values, _LENGTHS)
    bounds = [0, *torch.tensor(_LENGTHS).cumsum(0).tolist()]
    for name in ("logprobs_R", *_NAMES):
        found: dict[str, str] = {}
        for place, (start, end) in enumerate(itertools.pairwise(bounds)):
            for token in range(start, end):
                changed = values[name].clone()
                changed[token] = ~changed[token] if changed.dtype == torch.bool else changed[token] + 0.05
                differs = (by_token({**values, name: changed}, _LENGTHS) - base).abs() > 1e-12
                if differs[:start].any() or differs[end:].any():
                    found.setdefault("leak", f"{name} of sequence {place} changes losses of another sequence")
                differs[token] = False
                if reads == "token" and name != "correct_R" and differs[start:end].any():
                    other = start + int(differs[start:end].nonzero()[0])
                    found.setdefault(
                        "shift",
                        f"{name} of token {token - start} changes the loss of token {other - start} of its sequence; "
                        'an objective over whole sequences is checked with reads="sequence"',
                    )
        faults += found.values()
    return faults


def _losses_by_token(config: ObjectiveConfig) -> Callable[[Values, Sequence[int]], Tensor] | None:
    """Returns the user's loss of every token as a function of the values; None where the objective has none."""
    own = objective_function(config, "policy_loss")
    if own is None:
        return None

    def losses(values: Values, lengths: Sequence[int]) -> Tensor:
        given = {name: value for name, value in values.items() if name != "reference_logprobs_R"}
        result: Tensor = own(**given, detached_logprobs_R=values["logprobs_R"], lengths=tuple(lengths))
        return result.detach()

    return losses


def _faults_of_small_batches(config: ObjectiveConfig, values: Values) -> list[str]:
    faults = []
    for name, order in (("a response of one token", [1]), ("no response", [])):
        chosen, lengths = _sequences(values, order)
        try:
            loss = _loss(config, chosen, lengths)
        except Exception as error:  # whatever the user's function raises
            faults.append(f"a micro-batch with {name} raises {type(error).__name__}: {error}")
            continue
        if not bool(loss.isfinite()):
            faults.append(f"a micro-batch with {name} has the loss {loss.item()}")
    return faults


def _group(verdicts: Sequence[Verdict], rng: random.Random) -> list[GradedRollout]:
    prompt = Prompt(id=f"prompt-{rng.randrange(10**6)}", question="Compute 1+1.", gold_answer="2")
    group = []
    for index, verdict in enumerate(verdicts):
        count = rng.randint(1, 9)
        rollout = Rollout(
            prompt=prompt,
            sample_index=index,
            prompt_ids=(1, 2),
            response_ids=np.array([rng.randrange(3, 99) for _ in range(count)], dtype=np.int32),
            logprobs=np.array([-rng.random() for _ in range(count)], dtype=np.float32),
            text=f"response {index}",
            finish_reason=FinishReason.STOP,
            weight_spans=(WeightSpan(version=0, start=0, end=count),),
        )
        group.append(GradedRollout(rollout=rollout, grade=Grade(verdict=verdict, reason="", stage="rules")))
    return group


def _faults_of_groups(config: ObjectiveConfig, seed: int) -> list[str]:
    rng = random.Random(seed)
    correct, incorrect = Verdict.CORRECT, Verdict.INCORRECT
    faults = []
    groups = [
        _group(verdicts, rng)
        for verdicts in (
            [correct, incorrect, incorrect, correct, incorrect],
            [correct] * 4,
            [incorrect] * 4,
            [correct, incorrect],
            [correct],
        )
    ]
    for group in groups:
        if not is_useful(group, config):
            continue
        found = group_advantages(group, config)
        if group_advantages(group, config) != found:
            faults.append(f"advantages of {len(group)} responses differ at a second call")
            continue
        order = rng.sample(range(len(group)), len(group))
        shuffled = group_advantages([group[index] for index in order], config)
        if any(abs(shuffled[place] - found[index]) > 1e-12 for place, index in enumerate(order)):
            faults.append(f"advantages of {len(group)} responses depend on the order of the responses")

    def selected(groups: Sequence[Sequence[GradedRollout]]) -> dict[str, float]:
        selection = select_trajectories(groups, config, seed=seed, step=3, global_rng=random.Random(seed))
        return {trajectory.id: trajectory.advantage for trajectory in selection.trajectories}

    first = selected(groups)
    if any(selected(groups) != first for _ in range(8)):  # a draw from few responses often repeats once
        faults.append("the choice of responses differs between calls; draw with `rng`")
    elif config.pair_choice == "seeded" and selected(groups[::-1]) != first:
        faults.append("the choice of responses depends on the order of the groups; draw with `rng`")
    return faults


def _faults_of_token_weights(config: ObjectiveConfig, seed: int) -> list[str]:
    own = objective_function(config, "token_weights")
    generator = torch.Generator().manual_seed(seed)
    faults = []
    for count in (1, 8):
        scores_T = torch.randn(count, generator=generator)
        ids = {"prompt_ids": torch.arange(3), "response_ids": torch.arange(5, 5 + count)}
        for correct in (True, False):

            def weights(scores_T: Tensor = scores_T, ids: Values = ids, correct: bool = correct) -> Tensor:
                if own is None:
                    return token_weights(scores_T, correct=correct, config=config.token_weights)
                result: Tensor = own(scores_T=scores_T.clone(), correct=correct, config=config.token_weights, **ids)
                return result

            first, second = weights(), weights()
            what = f"token weights of a response of {count} tokens"
            if first.shape != scores_T.shape or first.dtype != torch.float32:
                faults.append(f"{what} are {first.dtype} of shape {list(first.shape)}; return float32 {[count]}")
            elif not bool((first.isfinite() & (first >= 0)).all()):
                faults.append(f"{what} are not finite numbers of at least 0: {first.tolist()}")
            elif not torch.equal(first, second):
                faults.append(f"{what} differ at a second call")
    return faults
