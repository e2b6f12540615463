"""The prompt stream with several sources, and with pass rates that follow the responses of training."""

from __future__ import annotations

import functools
import json
from collections import Counter
from dataclasses import replace

import pytest

from oreal_megatron.config import BalanceBin
from oreal_megatron.data.difficulty import BANDS, band_of, drawn_shares
from oreal_megatron.data.prompts import balanced
from oreal_megatron.data.stream import PromptStream
from oreal_megatron.types import Prompt, Verdict
from tests.graded import graded

WEIGHTS = {"math": 5.0, "code": 2.0, "logic": 1.0}
SIZES = {"math": 40, "code": 90, "logic": 17}
BINS = (BalanceBin(low=0.0, high=0.5, repeat=3), BalanceBin(low=0.5, high=0.8, repeat=1))


def prompt(name: str, pass_rate: float | None = None, source: str | None = None) -> Prompt:
    return Prompt(id=name, question=name, gold_answer="1", pass_rate=pass_rate, source=source)


def mixed(seed: int = 0) -> PromptStream:
    prompts = [prompt(f"{name}/{i}", source=name) for name, size in SIZES.items() for i in range(size)]
    return PromptStream(prompts, prompts_per_step=7, seed=seed, weights=WEIGHTS)


def test_sources_have_their_weights_at_every_step():
    stream, counts = mixed(), Counter()
    for step in range(1, 200):
        drawn = stream.draw()
        assert len({one.id for one in drawn}) == 7
        counts.update(one.source for one in drawn)
        for name, weight in WEIGHTS.items():
            # Repetitions that are put off to the next step count there.
            assert abs(counts[name] - 7 * step * weight / 8) < 3
    assert {one.id for one in (one for _ in range(40) for one in stream.draw())} >= {f"math/{i}" for i in range(40)}


def test_a_source_is_drawn_evenly_within_its_epochs():
    stream = mixed()
    drawn = Counter(one.id for _ in range(400) for one in stream.draw())
    for name in SIZES:
        own = [drawn[id] for id in drawn if id.startswith(name)]
        assert len(own) == SIZES[name] and max(own) - min(own) <= 2


def test_mixed_sources_depend_on_the_seed_and_resume_to_the_exact_prompt():
    stream = mixed()
    assert [stream.draw() for _ in range(9)] != [mixed(1).draw() for _ in range(9)]
    resumed = mixed()
    resumed.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    assert [resumed.draw() for _ in range(60)] == [stream.draw() for _ in range(60)]


def test_a_checkpoint_of_version_0_1_0_goes_on():
    stream = PromptStream([prompt(f"{i}") for i in range(20)], prompts_per_step=3, seed=5)
    # Written by that version after nine draws, with the prompts of its tenth.
    saved = {"epoch": 1, "offset": 7, "put_off": [], "num_prompts": 20, "data": "36509616e57d5ff8"}
    stream.load_state_dict(saved)
    assert [one.id for one in stream.draw()] == ["1", "19", "10"]


def test_a_weight_that_steps_cannot_keep_is_said(caplog):
    prompts = [prompt(f"a/{i}", source="a") for i in range(3)] + [prompt(f"b/{i}", source="b") for i in range(30)]
    stream = PromptStream(prompts, prompts_per_step=10, seed=0, weights={"a": 1.0, "b": 1.0})
    assert "data.train.a.weight cannot be kept" in caplog.text and "data.train.b" not in caplog.text
    assert all(len({one.id for one in stream.draw()}) == 10 for _ in range(20))
    with pytest.raises(ValueError, match=r"data\.train\.c: no prompts are left"):
        PromptStream(prompts, prompts_per_step=10, seed=0, weights={"a": 1.0, "c": 1.0})


def curriculum() -> PromptStream:
    prompts = [prompt(f"{i}", pass_rate=0.25) for i in range(12)]
    balance = functools.partial(balanced, bins=BINS)
    return PromptStream(balance(prompts), prompts_per_step=4, seed=0, rollout_weight=0.5, balance=balance)


def step(stream: PromptStream, outcomes: dict[str, list[Verdict]]) -> list[Prompt]:
    drawn = stream.draw()
    stream.observe([
        [graded(one, i, verdict) for i, verdict in enumerate(outcomes.get(one.id, [Verdict.INCORRECT] * 4))]
        for one in drawn
    ])  # fmt: skip
    return drawn


def test_pass_rates_follow_the_responses_and_the_next_epoch_is_balanced_by_them():
    """Prompt 0 is always solved: 0.25 -> 0.625 -> 0.8125 -> 0.90625 in its three draws; then it is left out."""
    always = {"0": [Verdict.CORRECT] * 3 + [Verdict.UNDECIDED], "1": [Verdict.UNDECIDED] * 4}
    stream, rates, first = curriculum(), [], Counter()
    for _ in range(9):  # 36 entries
        drawn = step(stream, always)
        first.update(one.id for one in drawn)
        rates += [one.pass_rate for one in drawn if one.id == "0"]
    assert rates[:3] == [0.25, 0.625, 0.8125] and first["0"] >= 2
    later = [step(stream, always) for _ in range(60)]
    assert "0" not in {one.id for drawn in later[12:] for one in drawn}
    # No response of prompt 1 was decided: its pass rate stays. Others fall towards 0.
    last = {one.id: one.pass_rate for drawn in later for one in drawn}
    assert last["1"] == 0.25 and 0.0 < last["2"] < 0.001


def test_lengths_of_the_last_group_are_kept_without_a_curriculum_and_are_no_data():
    def stream_of(**known) -> PromptStream:
        return PromptStream([replace(prompt("0"), **known)], prompts_per_step=1, seed=0)

    stream = stream_of()
    (first,) = stream.draw()
    group = [graded(first, i, Verdict.CORRECT) for i in range(3)]
    assert first.response_tokens is None
    stream.observe([group])
    tokens = sum(one.rollout.num_response_tokens for one in group) / 3
    assert tokens > 0 and stream.draw()[0].response_tokens == tokens
    resumed = stream_of(response_tokens=9.0)
    assert resumed.draw()[0].response_tokens == 9.0
    resumed.load_state_dict(stream.state_dict())
    assert resumed.draw()[0].response_tokens == tokens


def test_a_curriculum_resumes_to_the_exact_prompt_and_pass_rate():
    verdicts = {f"{i}": [Verdict.CORRECT] * (i % 4) + [Verdict.INCORRECT] * (4 - i % 4) for i in range(12)}
    stream = curriculum()
    for _ in range(17):
        step(stream, verdicts)
    resumed = curriculum()
    resumed.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    assert [step(resumed, verdicts) for _ in range(60)] == [step(stream, verdicts) for _ in range(60)]


def test_an_epoch_without_enough_hard_prompts_keeps_the_earlier_balance(caplog):
    stream = curriculum()
    drawn = [step(stream, {f"{i}": [Verdict.CORRECT] * 4 for i in range(12)}) for _ in range(40)]
    assert {one.id for one in drawn[-1]} and len({one.id for one in drawn[-1]}) == 4
    assert "data.train: epoch 2 has the balance of the one before it" in caplog.text
    assert "leaves 0 different prompts, and a step needs 4. Prompts by pass rate: 0.8_to_1: 12. Give" in caplog.text


def test_source_with_too_few_hard_prompts_keeps_its_weight(caplog):
    """All but two prompts of `a` become easy: with these two alone, `b` would fill the steps."""
    prompts = [prompt(f"a/{i}", 0.25, "a") for i in range(12)] + [prompt(f"b/{i}", 0.25, "b") for i in range(40)]
    balance = functools.partial(balanced, bins=BINS)
    stream = PromptStream(
        balance(prompts), prompts_per_step=8, seed=0, weights={"a": 3.0, "b": 5.0}, rollout_weight=1.0, balance=balance
    )
    solved = {f"a/{i}": [Verdict.CORRECT] * 4 for i in range(2, 12)}
    counts = Counter()
    for number in range(1, 121):
        counts.update(one.source for one in step(stream, solved))
        assert abs(counts["a"] - 3 * number) <= 3
    assert "data.train.a: epoch 1 has the balance of the one before it" in caplog.text
    assert "leaves 2 different prompts, and a step needs 3. Prompts by pass rate: 0: 2, 1: 10." in caplog.text
    assert "data.train.b: epoch" not in caplog.text


def test_pools_that_are_short_together_still_fill_a_step(caplog):
    """`a` has fewer prompts than its weight asks for, so `b` must keep what a step needs beside them."""
    prompts = [prompt(f"a/{i}", 0.25, "a") for i in range(3)] + [prompt(f"b/{i}", 0.25, "b") for i in range(12)]
    balance = functools.partial(balanced, bins=BINS)
    stream = PromptStream(
        balance(prompts), prompts_per_step=10, seed=0, weights={"a": 1.0, "b": 1.0}, rollout_weight=1.0, balance=balance
    )
    solved = {f"b/{i}": [Verdict.CORRECT] * 4 for i in range(6, 12)}
    assert all(len({one.id for one in step(stream, solved)}) == 10 for _ in range(30))
    assert "leaves 6 different prompts, and a step needs 7" in caplog.text


def test_shares_of_bands_and_sources():
    rates = [0.0, 0.1, 0.2, 0.39, 0.4, 0.6, 0.8, 0.99, 1.0, None]
    assert [band_of(rate) for rate in rates] == [
        "0", "0_to_0.2", "0.2_to_0.4", "0.2_to_0.4", "0.4_to_0.6", "0.6_to_0.8", "0.8_to_1", "0.8_to_1", "1", "unknown",
    ]  # fmt: skip
    shares = drawn_shares([prompt("a", 0.0, "x"), prompt("b", 0.5, "x"), prompt("c", 0.5, "y"), prompt("d", None, "y")])
    assert {name: share for name, share in shares.items() if share} == {
        "pass_rate_0": 0.25, "pass_rate_0.4_to_0.6": 0.5, "pass_rate_unknown": 0.25, "from_x": 0.5, "from_y": 0.5,
    }  # fmt: skip
    assert len(shares) == len(BANDS) + 1 + 2
    assert drawn_shares([prompt("a")]) == {}
