"""Token weights, eq. (10), against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from oreal_megatron.config import TokenWeightConfig
from oreal_megatron.losses.token_weights import token_weights

LOG3 = math.log(3.0)  # sigmoid(log 3) = 3/4


def config(**changes) -> TokenWeightConfig:
    base = {
        "source": "reward_model",
        "form": "confidence",
        "normalize": "none",
        "floor": 0.0,
        "alignment": "predictor",
        "positive_threshold": 0.5,
        "negative_threshold": 0.5,
        "top_share": None,
    }
    return TokenWeightConfig(**(base | changes))


def test_positive_and_negative_weights_by_hand():
    # Prefix means: log 3, 0, -log 3 -> c = 3/4, 1/2, 1/4.
    scores = torch.tensor([LOG3, -LOG3, -3 * LOG3])
    torch.testing.assert_close(token_weights(scores, correct=True, config=config()), torch.tensor([0.5, 0.0, 0.0]))
    torch.testing.assert_close(token_weights(scores, correct=False, config=config()), torch.tensor([0.0, 0.0, 0.5]))


def test_a_fresh_reward_model_gives_no_weight():
    for correct in (True, False):
        assert token_weights(torch.zeros(4), correct=correct, config=config()).sum() == 0


def test_thresholds_rescale_what_lies_above_them():
    scores = torch.tensor([LOG3])
    weights = token_weights(scores, correct=True, config=config(positive_threshold=0.25))
    torch.testing.assert_close(weights, torch.tensor([(0.75 - 0.25) / 0.75]))
    assert token_weights(scores, correct=False, config=config(negative_threshold=0.25)).item() == 0.0


def test_top_share_keeps_the_best_positions_and_rescales_them():
    # c falls with t: 4 positions, the top half is the first two, rescaled to 1 and 0.
    scores = torch.tensor([2.0, 0.0, -2.0, -4.0])
    weights = token_weights(scores, correct=True, config=config(top_share=0.5))
    torch.testing.assert_close(weights, torch.tensor([1.0, 0.0, 0.0, 0.0]))


def test_weights_of_one_without_a_reward_model():
    assert token_weights(torch.randn(3), correct=False, config=config(source="ones")).tolist() == [1.0, 1.0, 1.0]


def test_weights_carry_no_gradient_and_long_prefixes_keep_precision():
    scores = torch.full((16384,), 0.1, requires_grad=True)
    weights = token_weights(scores, correct=True, config=config())
    assert not weights.requires_grad
    exact = 2 / (1 + math.exp(-float(torch.tensor(0.1)))) - 1
    assert weights[-1].item() == pytest.approx(exact, rel=1e-6)


def test_changes_and_departures_by_hand():
    # Prefix means: log 3, 0, -log 3 -> c = 3/4, 1/2, 1/4 in a correct response, 1/4, 1/2, 3/4 in an incorrect one.
    scores = torch.tensor([LOG3, -LOG3, -3 * LOG3])
    change, departure = config(form="change"), config(form="departure")
    torch.testing.assert_close(token_weights(scores, correct=True, config=change), torch.tensor([0.25, 0.0, 0.0]))
    torch.testing.assert_close(token_weights(scores, correct=False, config=change), torch.tensor([0.0, 0.25, 0.25]))
    torch.testing.assert_close(token_weights(scores, correct=True, config=departure), torch.tensor([LOG3, 0.0, 0.0]))
    expected = torch.tensor([0.0, 2 * LOG3, 3 * LOG3])
    torch.testing.assert_close(token_weights(scores, correct=False, config=departure), expected)


@pytest.mark.parametrize("form", ["confidence", "change", "departure"])
def test_normalised_weights_have_the_mean_one_and_the_floor_is_kept(form):
    scores = torch.randn(7, generator=torch.Generator().manual_seed(0)) + 0.5
    weights = token_weights(scores, correct=True, config=config(form=form, normalize="mean"))
    assert weights.mean().item() == pytest.approx(1.0) and weights.min() >= 0
    kept = token_weights(scores, correct=True, config=config(form=form, normalize="mean", floor=0.25))
    torch.testing.assert_close(kept, 0.25 + 0.75 * weights)
    none = token_weights(torch.zeros(3), correct=True, config=config(form=form, normalize="mean", floor=0.25))
    assert none.tolist() == [0.25] * 3, "a fresh reward model gives no weight but the floor"
