"""Confidence intervals against published values, scipy's own, and the share of samples that they cover."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from oreal_megatron.intervals import interval_of_mean, paired_interval, sign_test


def test_a_share_has_wilsons_interval():
    # Newcombe (1998), table I, method 3: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
    for successes, count, low, high in (
        (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718),
    ):  # fmt: skip
        assert interval_of_mean([1.0] * successes + [0.0] * (count - successes)) == pytest.approx((low, high), abs=5e-5)


def test_a_mean_of_samples_has_the_bootstraps_interval():
    values = np.random.default_rng(1).beta(0.5, 0.5, size=200).tolist()
    found = interval_of_mean(values)
    assert found == interval_of_mean(values)  # the same at every call
    normal = stats.norm.interval(0.95, np.mean(values), stats.sem(values))
    assert found == pytest.approx(normal, abs=0.004)


def test_intervals_cover_the_true_mean_in_nineteen_of_twenty_draws():
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(200):
        solved = rng.beta(1, 2, size=100)  # chances of a correct response, with the mean 1 / 3
        low, high = interval_of_mean((rng.binomial(8, solved) / 8).tolist())
        covered += low <= 1 / 3 <= high
    assert 182 <= covered <= 198


def test_values_that_do_not_vary_have_no_interval():
    assert interval_of_mean([0.5, 0.5]) is None and interval_of_mean([]) is None
    assert paired_interval([1.0, 0.0], [1.0, 0.0]) is None
    assert interval_of_mean([0.0, 0.0]) == pytest.approx((0.0, 0.6576), abs=1e-4)


def test_pairs_have_a_narrower_interval_than_two_evaluations():
    rng = np.random.default_rng(3)
    solved = rng.random(300)
    first = (rng.random(300) < solved).astype(float)
    second = np.where(rng.random(300) < 0.1, 1.0, first)
    low, high = paired_interval(first.tolist(), second.tolist())
    difference = second - first
    expected = stats.norm.interval(0.95, difference.mean(), stats.sem(difference))
    assert (low, high) == pytest.approx(expected, abs=0.006)
    a, b = interval_of_mean(first.tolist()), interval_of_mean(second.tolist())
    assert low > 0 and high - low < 0.5 * (b[1] - b[0] + a[1] - a[0])


def test_sign_test_by_hand():
    assert sign_test(0, 0) == 1.0 and sign_test(5, 5) == 1.0
    assert sign_test(5, 0) == pytest.approx(2 / 32) and sign_test(1, 7) == pytest.approx(2 * 9 / 256)
