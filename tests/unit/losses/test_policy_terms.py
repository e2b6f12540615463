"""Loss terms and their gradients against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from oreal_megatron.config import parse_config
from oreal_megatron.losses.policy_terms import TokenCounts, kl_penalty, policy_terms, ranking_loss, reward_model_term


@pytest.fixture(scope="module")
def presets(composed):
    return lambda name, **changes: parse_config(composed(f"objective={name}")).objective.model_copy(update=changes)


# Two tokens of a correct response, three of an incorrect one.
LOGPROBS = [-0.5, -1.0, -0.25, -2.0, -1.5]
CORRECT = torch.tensor([True, True, False, False, False])
ADVANTAGES = torch.tensor([2.0, 2.0, -0.5, -0.5, -0.5])
WEIGHTS = torch.tensor([1.0, 0.5, 0.25, 1.0, 0.0])


def terms_of(config, rollout=None, reference=None, old=None):
    logprobs = torch.tensor(LOGPROBS, requires_grad=True)
    terms = policy_terms(
        config,
        logprobs_R=logprobs,
        reference_logprobs_R=logprobs.detach() if reference is None else reference,
        rollout_logprobs_R=logprobs.detach() if rollout is None else rollout,
        weights_R=WEIGHTS,
        advantages_R=ADVANTAGES,
        correct_R=CORRECT,
        lengths=(2, 3),
        old_logprobs_R=old,
    )
    return logprobs, terms


def test_oreal_terms_by_hand(presets):
    config = presets("oreal")
    logprobs, terms = terms_of(config)
    # -A w log pi: 2*1*0.5 + 2*0.5*1.0; -A w ratio with ratio 1: 0.5 * (0.25 + 1 + 0).
    assert terms.positive.item() == pytest.approx(2.0)
    assert terms.negative.item() == pytest.approx(0.625)
    assert terms.kl.item() == 0.0
    counts = TokenCounts(correct=4, incorrect=10, limit=0)
    loss = terms.loss(counts, config)
    assert loss.item() == pytest.approx(2.0 / 4 + 0.5 * 0.625 / 10)
    loss.backward()
    # d/dlogp: -A w / N_correct, and eta * (-A) w / N_incorrect through the ratio.
    expected = [-2.0 / 4, -1.0 / 4, 0.5 * 0.125 / 10, 0.5 * 0.5 / 10, 0.0]
    torch.testing.assert_close(logprobs.grad, torch.tensor(expected))


def test_kl_is_a_sum_over_all_tokens_divided_by_all(presets):
    config = presets("oreal", beta=1.0)
    reference = torch.tensor(LOGPROBS) + torch.tensor([math.log(2.0), 0.0, 0.0, -math.log(2.0), 0.0])
    _, terms = terms_of(config, reference=reference)
    expected = (2.0 - math.log(2.0) - 1.0) + (0.5 + math.log(2.0) - 1.0)
    assert terms.kl.item() == pytest.approx(expected, rel=1e-5)
    only_incorrect = terms_of(presets("oreal", kl_on_correct=False), reference=reference)[1]
    assert only_incorrect.kl.item() == pytest.approx(0.5 + math.log(2.0) - 1.0, rel=1e-5)


@pytest.mark.parametrize(("kl_type", "value"), [("k1", -0.3), ("mse", 0.045), ("k3", math.exp(0.3) - 1.3)])
def test_kl_penalties_by_hand(kl_type, value):
    assert kl_penalty(torch.tensor([-0.7]), torch.tensor([-1.0]), kl_type).item() == pytest.approx(value, rel=1e-5)


def test_an_unknown_kl_type_is_an_error():
    with pytest.raises(ValueError, match=r"'k2'.*k3, k1 or mse"):
        kl_penalty(torch.zeros(1), torch.zeros(1), "k2")


def test_grpo_clips_the_ratio_only_where_it_would_gain(presets):
    config = presets("grpo")
    # Ratios 1.5 (A > 0: clipped to 1.2) and 0.5 (A < 0: clipped to 0.8), the rest 1.
    rollout = torch.tensor(LOGPROBS) - torch.tensor([math.log(1.5), 0.0, 0.0, math.log(0.5), 0.0])
    logprobs, terms = terms_of(config, rollout=rollout)
    assert terms.positive.item() == pytest.approx(-(2.0 * 1.2 * 1.0) - 2.0 * 0.5)
    assert terms.negative.item() == pytest.approx(0.5 * 0.25 + 0.5 * 0.8, rel=1e-5)
    (terms.positive + terms.negative).backward()
    assert logprobs.grad[0].item() == 0.0 and logprobs.grad[3].item() == 0.0
    assert logprobs.grad[1].item() == pytest.approx(-1.0)


def test_importance_weights_are_truncated_without_gradient(presets):
    # pi / pi_rollout = 1/2, 4 (truncated to 2), 1, 3 (truncated to 2), 1.
    ratios = torch.tensor([0.5, 4.0, 1.0, 3.0, 1.0])
    rollout = torch.tensor(LOGPROBS) - ratios.log()
    logprobs, terms = terms_of(presets("oreal", importance_limit=2.0), rollout=rollout)
    # As in the first test, token by token times the weight; the KL has none.
    assert terms.positive.item() == pytest.approx(0.5 * 1.0 + 2.0 * 1.0)
    assert terms.negative.item() == pytest.approx(1.0 * 0.125 + 2.0 * 0.5)
    (terms.positive + terms.negative).backward()
    expected = [0.5 * -2.0, 2.0 * -1.0, 1.0 * 0.125, 2.0 * 0.5, 0.0]
    torch.testing.assert_close(logprobs.grad, torch.tensor(expected))


def test_several_updates_clip_against_the_policy_before_the_first(presets):
    """Behaviour, proximal and present policy: min(old / rollout, 2) times the clipped present / old."""
    old = torch.tensor(LOGPROBS) - torch.tensor([1.5, 1.1, 1.1, 0.5, 1.0]).log()
    rollout = old - torch.tensor([0.5, 4.0, 1.0, 3.0, 1.0]).log()
    logprobs, terms = terms_of(presets("grpo_epochs"), rollout=rollout, old=old)
    # Ratios 1.5 (A > 0: clipped to 1.2), 1.1, 1.1, 0.5 (A < 0: clipped to 0.8); importance 0.5, 2, 1, 2.
    assert terms.positive.item() == pytest.approx(-2.0 * (0.5 * 1.0 * 1.2 + 2.0 * 0.5 * 1.1), rel=1e-5)
    assert terms.negative.item() == pytest.approx(0.5 * (1.0 * 0.25 * 1.1 + 2.0 * 1.0 * 0.8), rel=1e-5)
    (terms.positive + terms.negative).backward()
    expected = [0.0, -2.0 * 2.0 * 0.5 * 1.1, 0.5 * 0.25 * 1.1, 0.0, 0.0]
    torch.testing.assert_close(logprobs.grad, torch.tensor(expected))


def test_token_outside_of_the_band_has_the_kl_term_alone(presets):
    # pi / pi_rollout = 1/2 (the edge is inside), 4, 1, 3 (both outside), 1.
    rollout = torch.tensor(LOGPROBS) - torch.tensor([0.5, 4.0, 1.0, 3.0, 1.0]).log()
    reference = torch.tensor(LOGPROBS) - 0.1
    config = presets("oreal", importance_token_band=(0.5, 2.0))
    logprobs, terms = terms_of(config, rollout=rollout, reference=reference)
    _, plain = terms_of(presets("oreal"), reference=reference)
    # The tokens' own terms are 1.0, 1.0; 0.125, 0.5, 0.0, as in the test of importance weights.
    assert terms.positive.item() == pytest.approx(1.0) and terms.negative.item() == pytest.approx(0.125)
    assert terms.kl.item() == plain.kl.item()
    (terms.positive + terms.negative).backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([-2.0, 0.0, 0.125, 0.0, 0.0]))


def test_response_whose_mean_ratio_leaves_the_band_is_dropped(presets):
    # The first response's ratios 1/2 and 4 have the geometric mean sqrt(2); the second's 1, 27 and 1 have 3.
    rollout = torch.tensor(LOGPROBS) - torch.tensor([0.5, 4.0, 1.0, 27.0, 1.0]).log()
    logprobs, terms = terms_of(presets("oreal", importance_response_band=(0.5, 2.0)), rollout=rollout)
    assert terms.positive.item() == pytest.approx(2.0) and terms.negative.item() == 0.0
    (terms.positive + terms.negative).backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([-2.0, -1.0, 0.0, 0.0, 0.0]))
    both = presets("oreal", importance_response_band=(0.5, 2.0), importance_token_band=(0.1, 3.0), importance_limit=2.0)
    assert terms_of(both, rollout=rollout)[1].positive.item() == pytest.approx(0.5)


def test_rollouts_of_the_policy_itself_have_importance_one(presets):
    _, weighted = terms_of(presets("oreal", importance_limit=2.0))
    _, plain = terms_of(presets("oreal"))
    assert (weighted.positive.item(), weighted.negative.item()) == (plain.positive.item(), plain.negative.item())


def test_baselines_share_one_denominator(presets):
    config = presets("reinforce", beta=0.0)
    _, terms = terms_of(config)
    by_hand = ((2.0 * 0.5 + 1.0 * 1.0) + (-0.5 * 0.25 * 0.25 - 0.5 * 2.0)) / 14
    assert terms.loss(TokenCounts(correct=4, incorrect=10, limit=0), config).item() == pytest.approx(by_hand)


def test_splitting_a_batch_changes_no_loss(presets):
    config = presets("oreal", beta=0.1)
    counts = TokenCounts(correct=2, incorrect=3, limit=0)
    generator = torch.Generator().manual_seed(0)
    logprobs, reference, rollout = (-torch.rand(3, 5, generator=generator)).unbind(0)

    def loss_of(part):
        terms = policy_terms(
            config,
            logprobs_R=logprobs[part],
            reference_logprobs_R=reference[part],
            rollout_logprobs_R=rollout[part],
            weights_R=WEIGHTS[part],
            advantages_R=ADVANTAGES[part],
            correct_R=CORRECT[part],
            lengths=(len(CORRECT[part]),),
        )
        return terms.loss(counts, config)

    torch.testing.assert_close(loss_of(slice(0, 5)), loss_of(slice(0, 2)) + loss_of(slice(2, 5)))


def test_no_correct_token_at_all_divides_by_one(presets):
    config = presets("oreal")
    empty = torch.zeros(0)
    terms = policy_terms(
        config,
        logprobs_R=empty,
        reference_logprobs_R=empty,
        rollout_logprobs_R=empty,
        weights_R=empty,
        advantages_R=empty,
        correct_R=empty.bool(),
        lengths=(len(empty.bool()),),
    )
    assert terms.loss(TokenCounts(correct=0, incorrect=0, limit=0), config).item() == 0.0


def test_reward_model_term_is_one_cross_entropy_a_sequence():
    value = reward_model_term(torch.tensor([0.0, math.log(3.0)]), torch.tensor([True, False]))
    assert value.item() == pytest.approx(math.log(2.0) + math.log(4.0))


def test_ranking_compares_the_pairs_of_a_prompt():
    scores, outcomes = [0.5, -1.0, 2.0, 0.0, 3.0], [True, False, False, True, True]
    loss, derivative = ranking_loss(scores, outcomes, ["a", "a", "a", "b", "c"])
    # The pairs of "a": gaps of 1.5 and -1.5; "b" and "c" have no pair.
    first, second = 1 / (1 + math.exp(1.5)), 1 / (1 + math.exp(-1.5))
    assert loss == pytest.approx(-(math.log(1 - first) + math.log(1 - second)) / 2)
    assert derivative == pytest.approx([-(first + second) / 2, first / 2, second / 2, 0.0, 0.0])
    assert ranking_loss([1.0, 2.0], [True, False], ["a", "b"]) == (0.0, [0.0, 0.0])
