"""check_objective: the project's presets pass, planted faults are found, and functions of one's own are called."""

from __future__ import annotations

import random

import pytest
import torch
from pydantic import BaseModel

from oreal_megatron.config import ConfigError
from oreal_megatron.testing import check_objective

PRESETS = (
    "oreal", "oreal_change", "oreal_paper", "oreal_release", "oreal_no_rm", "oreal_release_no_rm",
    "grpo", "rloo", "reinforce", "raft", "reinforce_rej", "psr", "nsr", "dapo", "dr_grpo", "cispo", "reinforce_pp",
    "grpo_epochs",
)  # fmt: skip
OWN = f"objective.functions.{{}}={__name__}.{{}}"


def own(point: str, function: str) -> str:
    return OWN.format(point, function)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_passes(preset):
    check_objective([f"objective={preset}"])


def test_the_preset_with_ratios_of_whole_responses_passes():
    check_objective(["objective=gspo"], reads="sequence")


def test_bands_of_importance_ratios_pass():
    check_objective(["objective.importance_token_band=[0.9,1.1]"])
    check_objective(["objective.importance_response_band=[0.97,1.03]"], reads="sequence")


# Policy losses: right ones, and one for each fault.


def clipped(*, logprobs_R, old_logprobs_R, advantages_R, weights_R, **_):
    ratio_R = (logprobs_R - old_logprobs_R).exp()
    return -weights_R * torch.minimum(ratio_R * advantages_R, ratio_R.clamp(0.8, 1.2) * advantages_R)


def by_sequence(*, logprobs_R, rollout_logprobs_R, advantages_R, lengths, **_):
    """The ratio of a whole sequence, its length's root, as GSPO has it."""
    parts = (logprobs_R - rollout_logprobs_R).split(lengths)
    ratio_R = torch.cat([logprobs_R[:0], *(part.mean().exp().expand(len(part)) for part in parts)])
    return -ratio_R * advantages_R


def mean_over_the_micro_batch(*, logprobs_R, advantages_R, **_):
    return -advantages_R * logprobs_R / max(len(logprobs_R), 1)


def leak_across_sequences(*, logprobs_R, advantages_R, **_):
    return -advantages_R * logprobs_R.cumsum(0)


def shifted_by_one(*, logprobs_R, weights_R, advantages_R, **_):
    return -advantages_R * weights_R.roll(1) * logprobs_R


def detached(*, logprobs_R, advantages_R, **_):
    return -advantages_R * logprobs_R.detach().exp() * logprobs_R


def by_place_in_the_micro_batch(*, logprobs_R, advantages_R, **_):
    return -advantages_R * logprobs_R * torch.linspace(1.0, 2.0, len(logprobs_R), dtype=torch.float64)


def fails_without_responses(*, logprobs_R, advantages_R, **_):
    return -advantages_R * (logprobs_R / logprobs_R.abs().max())


def spread_of_one_token(*, logprobs_R, advantages_R, lengths, **_):
    parts = [part.std().expand(len(part)) for part in logprobs_R.split(lengths)]
    return -advantages_R * torch.cat([logprobs_R[:0], *parts])


def test_right_losses_pass():
    check_objective([own("policy_loss", "clipped")])
    check_objective([own("policy_loss", "by_sequence")], reads="sequence")


@pytest.mark.parametrize(
    ("function", "fault"),
    [
        ("mean_over_the_micro_batch", "one micro-batch for each sequence: the loss is"),
        ("leak_across_sequences", "logprobs_R of sequence 0 changes losses of another sequence"),
        ("shifted_by_one", "weights_R of token 0 changes the loss of token 1 of its sequence"),
        ("detached", "the gradient is not that of the loss"),
        ("by_place_in_the_micro_batch", "sequences in another order: the loss is"),
        ("fails_without_responses", "a micro-batch with no response raises"),
        ("spread_of_one_token", "a micro-batch with a response of one token has the loss nan"),
        ("by_sequence", 'an objective over whole sequences is checked with reads="sequence"'),
    ],
)
def test_a_planted_fault_of_a_loss_is_found(function, fault):
    with pytest.raises(AssertionError) as caught:
        check_objective([own("policy_loss", function)])
    assert fault in str(caught.value)


# The other functions.


class Scale(BaseModel):
    power: float = 1.0


def by_length(*, responses, settings: Scale):
    return [(1.0 if r.is_correct else -1.0) / r.rollout.num_response_tokens**settings.power for r in responses]


def by_place(*, responses):
    return [float(index) for index, _ in enumerate(responses)]


def drawn(*, responses):
    return [random.random() for _ in responses]


def first_two(*, trajectories, rng):
    return trajectories[:2]


def unseeded(*, trajectories, rng):
    return random.sample(trajectories, 1)


def repeated(*, trajectories, rng):
    return [trajectories[0], trajectories[0]]


def everything(*, responses):
    return True


def failing(*, responses):
    raise KeyError("no")


def half(*, scores_T, **_):
    return torch.full_like(scores_T, 0.5)


def noise(*, scores_T, **_):
    return torch.rand(len(scores_T))


def absolute(*, reference_logprobs_R, logprobs_R):
    return (reference_logprobs_R - logprobs_R).abs()


def summed(*, reference_logprobs_R, logprobs_R):
    return (reference_logprobs_R - logprobs_R).sum()


def test_right_functions_pass_together():
    check_objective(
        [
            f"objective.functions.advantages={{path: {__name__}.by_length, settings: {{power: 0.5}}}}",
            own("choose", "first_two"), own("keep_group", "everything"), own("token_weights", "half"),
            own("kl", "absolute"),
        ]
    )  # fmt: skip


@pytest.mark.parametrize(
    ("point", "function", "fault"),
    [
        ("advantages", "by_place", "depend on the order of the responses"),
        ("advantages", "drawn", "differ at a second call"),
        ("choose", "unseeded", "the choice of responses differs between calls"),
        ("token_weights", "noise", "token weights of a response of 1 tokens differ at a second call"),
    ],
)
def test_a_planted_fault_of_a_function_is_found(point, function, fault):
    with pytest.raises(AssertionError) as caught:
        check_objective([own(point, function)])
    assert fault in str(caught.value)


@pytest.mark.parametrize(
    ("point", "function", "fault"),
    [
        ("kl", "summed", r"objective.functions.kl = .*summed returned torch.float64 of shape \[\]"),
        ("choose", "repeated", r"choose = .*repeated returned .*; return some of its trajectories, each once"),
        ("advantages", "failing", "advantages = .*failing raised KeyError: .no."),
    ],
)
def test_what_a_function_may_not_return_is_named(point, function, fault):
    with pytest.raises((ValueError, TypeError), match=fault):
        check_objective([own(point, function)])


@pytest.mark.parametrize(
    ("override", "key", "remedy"),
    [
        ("objective.functions.kl=nowhere.kl", "objective.functions.kl", "It cannot be imported: ModuleNotFoundError"),
        (f"objective.functions.kl={__name__}.PRESETS", "objective.functions.kl", "It is a tuple"),
        (own("kl", "by_length"), "objective.functions.kl", "argument: 'responses'"),
        (
            f"objective.functions.kl={{path: {__name__}.absolute, settings: {{a: 1}}}}",
            "objective.functions.kl.settings",
            "has no parameter `settings`",
        ),
        (
            f"objective.functions.advantages={{path: {__name__}.by_length, settings: {{power: high}}}}",
            "objective.functions.advantages.settings.power",
            "valid number",
        ),
        (
            f"objective.functions.advantages={{path: {__name__}.by_length, settings: {{powr: 1.0}}}}",
            "objective.functions.advantages.settings.powr",
            "Did you mean `power`?",
        ),
        ("objective.functions.kl=builtins.dict", "objective.functions.kl", "Its parameters are not known"),
    ],
)
def test_a_function_that_cannot_be_used_is_refused_before_a_run(override, key, remedy):
    with pytest.raises(ConfigError) as caught:
        check_objective([override])
    (violation,) = caught.value.violations
    assert violation.key == key and remedy in violation.remedy
