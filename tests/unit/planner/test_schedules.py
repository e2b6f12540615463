"""Simulated steps of each `rollout.schedule`, against closed forms where there are any."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from oreal_megatron.planner import schedules
from oreal_megatron.planner.schedules import Setting, generation_seconds, lognormal_lengths, simulate

EVEN = Setting(
    num_servers=4,
    places=64,
    token_seconds=lambda sequences, length: 0.01,
    prefill_token_seconds=0.0,
    prompt_tokens=100.0,
    samples_per_prompt=8,
    responses=128,
    lengths=(500,),
    train_seconds=3.0,
    publish_seconds=0.5,
)
"""Every response takes 5 s, however many there are."""


@pytest.mark.parametrize(
    ("schedule", "staleness", "train_seconds", "step_seconds"),
    [
        ("in_turn", 0, 3.0, 5.0 + 3.0 + 0.5),
        ("one_ahead", 1, 3.0, 5.0 + 0.5),
        ("one_ahead", 1, 9.0, 9.0 + 0.5),
        ("continuous", 1, 9.0, 9.0 + 0.5),
    ],
)
def test_a_step_takes_what_is_not_overlapped(schedule, staleness, train_seconds, step_seconds):
    found = simulate(replace(EVEN, train_seconds=train_seconds), schedule, staleness)
    assert found.step_seconds == pytest.approx(step_seconds)
    assert found.idle_share == pytest.approx(1 - 5.0 / step_seconds)
    assert found.mean_staleness == pytest.approx(staleness)


def test_generation_of_one_server_is_that_of_shrinking_batches():
    lengths = (100, 250, 250, 900)
    setting = replace(
        EVEN, num_servers=1, lengths=lengths, responses=4, token_seconds=lambda n, length: 0.01 + 0.002 * n
    )  # fmt: skip
    drawn = sorted(np.random.default_rng(0).choice(lengths, 4))
    expected = sum(
        (length - before) * (0.01 + 0.002 * (4 - index))
        for index, (length, before) in enumerate(zip(drawn, [0, *drawn], strict=False))
    )
    assert generation_seconds(setting) == pytest.approx(expected)


def test_responses_beyond_the_places_wait():
    assert generation_seconds(replace(EVEN, places=8)) == pytest.approx(4 * 5.0)
    assert generation_seconds(replace(EVEN, places=8, prefill_token_seconds=0.001)) == pytest.approx(
        # Of each wave, a server first reads the prompt of its eight responses.
        4 * (5.0 + 0.1)
    )


def test_work_that_was_begun_is_read_again_after_a_publication():
    """In every second step, when 300 tokens of each of a server's 32 responses were generated while a step trained."""
    setting = replace(EVEN, prompt_tokens=0.0)
    cheap = simulate(setting, "continuous", 1).step_seconds
    dear = simulate(replace(setting, prefill_token_seconds=1e-4), "continuous", 1).step_seconds
    assert dear == pytest.approx(cheap + 32 * 300 * 1e-4 / 2)
    kept = simulate(replace(setting, prefill_token_seconds=1e-4, keep_cache=True), "continuous", 1)
    assert kept.step_seconds == pytest.approx(cheap)


def test_measured_steps_are_whole_periods(monkeypatch):
    """With a tail and a bound of 4 steps repeat every five: the mean of 24 of them is 5% less than that of 95."""
    tail = replace(
        EVEN, num_servers=1, samples_per_prompt=1, responses=32, lengths=(*[48] * 31, 480), as_listed=True,
        prompt_tokens=0.0, train_seconds=0.75, publish_seconds=0.07, keep_cache=True,
        token_seconds=lambda n, length: float(np.interp(n, (1, 32, 64), (0.004, 0.014, 0.023))),
    )  # fmt: skip
    few = simulate(tail, "continuous", 4).step_seconds
    monkeypatch.setattr(schedules, "_MEASURED_STEPS", 95)
    assert few == pytest.approx(simulate(tail, "continuous", 4).step_seconds, rel=0.01)


def test_listed_lengths_are_of_all_responses_and_times_are_positive():
    with pytest.raises(ValueError, match="1 lengths are listed for 128 responses"):
        generation_seconds(replace(EVEN, as_listed=True))
    with pytest.raises(ValueError, match="token_seconds is not positive"):
        simulate(replace(EVEN, token_seconds=lambda n, length: 0.1 - 0.001 * length), "in_turn", 0)


def test_a_request_takes_a_server_time_once():
    again = replace(EVEN, prompt_tokens=0.0, request_seconds=0.01)
    assert generation_seconds(again) == pytest.approx(5.0 + 32 * 0.01)
    # 32 requests of each of four servers: what a publication interrupts is still the same request.
    steps = {ahead: simulate(again, "continuous", ahead).step_seconds for ahead in (0, 1)}
    without = {ahead: simulate(EVEN, "continuous", ahead).step_seconds for ahead in (0, 1)}
    assert steps[0] == pytest.approx(without[0] + 32 * 0.01)
    assert steps[1] <= without[1] + 32 * 0.01 + 1e-9


def test_a_kept_response_is_as_old_as_the_weights_that_began_it():
    # A response of 500 tokens, of which 200 come after the publication in every second step.
    again, kept = (simulate(replace(EVEN, keep_cache=keep), "continuous", 1) for keep in (False, True))
    assert kept.step_seconds == pytest.approx(again.step_seconds)
    assert kept.mean_staleness == 1.0 and again.mean_staleness == pytest.approx((1.0 + 300 / 500) / 2)


def test_other_steps_fill_the_wait_for_long_responses():
    tail = replace(EVEN, lengths=(*[200] * 31, 2000), token_seconds=lambda n, length: 0.002 + 0.0005 * n, places=256)
    in_turn, one_ahead = simulate(tail, "in_turn", 0), simulate(tail, "one_ahead", 1)
    ahead = [simulate(tail, "continuous", bound) for bound in (1, 2, 4)]
    steps = [found.step_seconds for found in (in_turn, one_ahead, *ahead)]
    assert steps == sorted(steps, reverse=True)
    assert ahead[-1].step_seconds >= EVEN.train_seconds + EVEN.publish_seconds
    assert ahead[-1].idle_share < in_turn.idle_share / 2
    assert all(0 < found.mean_staleness <= found.max_staleness for found in ahead)


def test_a_token_takes_longer_as_responses_grow():
    """With a server's sum of tokens times 1e-5 s: the integral over the growth of the responses that are left."""
    setting = replace(
        EVEN, num_servers=1, lengths=(100, 300), responses=2, as_listed=True, train_seconds=0.0, publish_seconds=0.0,
        token_seconds=lambda n, length: 0.001 + 1e-5 * n * length,
    )  # fmt: skip
    # The prompts have 100 tokens each: two responses grow to 200, then one to 400.
    expected = 100 * (0.001 + 1e-5 * 2 * 150) + 200 * (0.001 + 1e-5 * 300)
    assert generation_seconds(setting) == pytest.approx(expected, rel=1e-3)
    assert simulate(setting, "in_turn", 0).step_seconds == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("mean", "limit"), [(7000, 14_000), (300, 14_000), (13_000, 14_000)])
def test_lengths_have_the_mean_and_the_limit(mean, limit):
    lengths = lognormal_lengths(mean, limit, 1024)
    assert np.mean(lengths) == pytest.approx(mean, rel=1e-3)
    assert min(lengths) >= 1 and max(lengths) <= limit
