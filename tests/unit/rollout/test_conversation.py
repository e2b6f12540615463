"""Loops of several turns on a real policy: what is generated, inserted, limited, and what trains."""

from __future__ import annotations

import asyncio
import time
import types

import numpy as np
import pytest
import torch

from oreal_megatron.config import ConfigError, SamplingConfig, parse_config
from oreal_megatron.data.packing import PackedSequence, Packer, micro_batches
from oreal_megatron.data.prompting import PromptRenderer
from oreal_megatron.data.tokenizer import arithmetic_tokenizer
from oreal_megatron.extensions import generation_function
from oreal_megatron.losses.policy_terms import TokenCounts
from oreal_megatron.models.kv_decoder import CachedDecoder
from oreal_megatron.models.policy import build_policy
from oreal_megatron.rollout.conversation import LoopGenerator, _Outcome
from oreal_megatron.rollout.embedded import EmbeddedEngine
from oreal_megatron.rollout.journal import RolloutJournal
from oreal_megatron.rollout.sampler import Sampler, rollout_seeds
from oreal_megatron.step import logprobs_of, update_policy, with_reference, with_token_weights
from oreal_megatron.stopping import StopRequest
from oreal_megatron.train import packed
from oreal_megatron.types import (
    Completion,
    FinishReason,
    GenerationRequest,
    Grade,
    GradedRollout,
    Prompt,
    Trajectory,
    Verdict,
)
from tests.tiny_models import GEOMETRY, LOGPROB_ROUNDING, MODEL
from tests.unit.test_step import CPU, trained

SAMPLING = SamplingConfig(temperature=1.0, top_p=1.0, max_new_tokens=40)
PROMPTS = [Prompt(id=str(n), question=f"{n}+{n}", gold_answer=str(2 * n)) for n in range(3)]


@pytest.fixture(scope="module")
def renderer(composed) -> PromptRenderer:
    return PromptRenderer(arithmetic_tokenizer(), parse_config(composed()).prompt, vocab_size=105)


@pytest.fixture(scope="module")
def policy(single_process):
    return build_policy(GEOMETRY, MODEL, single_process, vocab_size=105, seed=0)


@pytest.fixture
def sample(renderer, policy, single_process, tmp_path):
    """Samples two responses a prompt by a loop, or without one; `graded` has what the grader was asked."""
    engine = EmbeddedEngine(
        lambda: CachedDecoder(policy, single_process, 105), stop_token_id=renderer.stop_token_id, batch_size=4
    )
    asked = []

    def grade(requests):
        asked.extend(requests)
        return [Grade(verdict=Verdict.CORRECT, reason="", stage="rules") for _ in requests]

    def run(loop=None, *, directory="journal", all_units_at_once=False, seconds=20.0, sampling=SAMPLING):
        generator = engine
        if loop is not None:
            generator = LoopGenerator(
                engine, loop, renderer, single_process, StopRequest(), name="rollout.generation.function = mine.loop",
                seconds=seconds, all_units_at_once=all_units_at_once,
            )  # fmt: skip
        journal = RolloutJournal(tmp_path / directory, single_process)
        sampler = Sampler(
            generator, renderer, grade, journal, single_process, StopRequest(), max_sequence_length=64, undecided=None
        )
        return sampler.sample(
            PROMPTS, batch_name="step_000000", num_samples=2, sampling=sampling, seed_of=rollout_seeds(0, "train", 0)
        ).groups

    run.asked = asked
    return run


async def one_turn(*, conversation, **_):
    await conversation.generate()


async def two_turns(*, conversation, question, **_):
    """Six tokens of the policy, a message with the question in reverse, and another turn."""
    assert question.count("+") == 1
    await conversation.generate(6)
    await asyncio.sleep(0.01)
    conversation.append_message("tool", question[::-1])
    turn = await conversation.generate(5)
    assert turn.token_ids == conversation.token_ids[-len(turn.token_ids) :] and turn.weight_version == 0


def as_records(groups):
    return [[graded.to_json() | {"grade": None} for graded in group] for group in groups]


def same(first, second) -> bool:
    return str(as_records(first)) == str(as_records(second))


def test_loop_of_one_turn_generates_what_no_loop_does(sample):
    assert same(sample(one_turn), sample(directory="other"))


def test_parts_of_units_change_nothing(sample):
    assert same(sample(two_turns), sample(two_turns, directory="other", all_units_at_once=True))


def test_inserted_tokens_are_the_templates_and_have_no_logprobs(sample, renderer):
    groups = sample(two_turns)
    for graded in (graded for group in groups for graded in group):
        rollout = graded.rollout
        ((start, end),) = rollout.inserted_spans
        ended = rollout.response_ids[start - 1] == renderer.stop_token_id
        text = ("" if ended else "<|im_end|>") + "\n<|im_start|>tool\n{}<|im_end|>\n<|im_start|>assistant\n"
        expected = renderer.text_ids(text.format(rollout.prompt.question[::-1]))
        assert tuple(rollout.response_ids[start:end]) == expected and start <= 6
        assert len(rollout.logprobs) == rollout.num_policy_tokens == len(rollout.response_ids) - len(expected)
        assert rollout.num_response_tokens == len(rollout.response_ids) and rollout.policy_mask.sum() == len(
            rollout.logprobs
        )
        last = renderer.response_text(rollout.response_ids[end:].tolist())
        assert last in [request.response for request in sample.asked]
    assert not any("tool" in request.response for request in sample.asked)
    # A second start finds everything in the journal, and asks neither the policy nor the loop.
    assert same(sample(one_turn), groups)


def test_both_turns_have_the_policys_own_logprobs_and_nothing_else_trains(sample, policy, composed, single_process):
    groups = sample(two_turns)
    rollouts = [graded.rollout for group in groups for graded in group]
    sequences = [PackedSequence.from_rollout(rollout, correct=True, advantage=1.0) for rollout in rollouts]
    batches = micro_batches(sequences, 100, CPU)
    for batch, logprobs_R in zip(batches, logprobs_of(policy, batches, single_process), strict=True):
        torch.testing.assert_close(logprobs_R, batch.rollout_logprobs, atol=LOGPROB_ROUNDING, rtol=0)
    # By hand: the loss is the mean of -log pi over the tokens of the policy, and so are the KL and the denominators.
    config = parse_config(composed("objective=reinforce")).objective
    run = types.SimpleNamespace(
        config=parse_config(composed("objective=reinforce")), progress=types.SimpleNamespace(weight_version=0),
        packer=Packer.of_layout(single_process, GEOMETRY, 105), groups=single_process,
    )  # fmt: skip
    counts, batches = packed(run, [Trajectory(rollout=one, correct=True, advantage=1.0) for one in rollouts])
    num_tokens = sum(len(one.logprobs) for one in rollouts)
    assert counts == TokenCounts(correct=num_tokens, incorrect=0, limit=counts.limit)
    reference = build_policy(GEOMETRY, MODEL, single_process, vocab_size=105, seed=1)
    batches = with_reference(reference, with_token_weights(batches, None, config, single_process), single_process)
    metrics = update_policy(trained(build_policy, single_process), batches, config, counts)
    by_hand = -sum(float(one.logprobs.sum()) for one in rollouts) / num_tokens
    assert metrics["loss/positive"] == pytest.approx(by_hand, rel=1e-5)
    gaps = []
    for one in rollouts:
        whole = micro_batches(
            [PackedSequence(id="", prompt_ids=one.prompt_ids, response_ids=one.response_ids)], 100, CPU
        )
        ((ours_T,), (theirs_T,)) = (logprobs_of(model, whole, single_process) for model in (policy, reference))
        gaps.append((theirs_T - ours_T)[torch.from_numpy(one.policy_mask)])
    gap = torch.cat(gaps)
    assert metrics["loss/kl"] == pytest.approx((gap.exp() - gap - 1).mean().item(), rel=1e-4)
    assert metrics["policy/token_weight"] == 1.0


def test_a_record_keeps_the_spans_and_others_have_none(sample):
    (first, *_), *_ = sample(two_turns)
    again = GradedRollout.from_json(first.to_json())
    assert again.rollout.inserted_spans == first.rollout.inserted_spans != ()
    np.testing.assert_array_equal(again.rollout.policy_mask, first.rollout.policy_mask)
    (plain, *_), *_ = sample(one_turn, directory="other")
    assert "inserted_spans" not in plain.to_json() and plain.rollout.policy_mask is None


def test_older_tokens_are_counted_without_inserted_ones(sample):
    (graded, *_), *_ = sample(two_turns)
    assert graded.rollout.num_older_tokens(0) == 0
    assert graded.rollout.num_older_tokens(1) == graded.rollout.num_policy_tokens


@pytest.mark.parametrize("limit", [8, 20])
def test_the_limit_is_that_of_the_whole_response(sample, limit):
    seen = []

    async def loop(*, conversation, **_):
        await conversation.generate(4)
        conversation.append("1+1=2\n1+1")
        seen.append(conversation.room)
        turn = await conversation.generate()
        assert turn.stopped or not conversation.room

    sampling = SAMPLING.model_copy(update={"max_new_tokens": limit})
    for graded in (graded for group in sample(loop, sampling=sampling) for graded in group):
        rollout = graded.rollout
        assert len(rollout.response_ids) <= limit
        assert (rollout.finish_reason is FinishReason.STOP) == (rollout.last_turn_ids[-1:].tolist() == [2])
    assert all(room >= 0 for room in seen) and (limit == 20 or 0 in seen)


def test_a_response_that_ends_with_inserted_tokens_has_not_stopped(sample):
    async def loop(*, conversation, **_):
        await conversation.generate(2)
        conversation.append_ids([2])  # the stop token, which the policy did not write

    rollouts = [graded.rollout for group in sample(loop) for graded in group]
    assert {rollout.finish_reason for rollout in rollouts} == {FinishReason.LENGTH}


async def raises(*, conversation, **_):
    await conversation.generate(2)
    raise KeyError("tool")


async def generates_nothing(*, conversation, **_):
    conversation.append("1")


async def never_ends(*, conversation, **_):
    await conversation.generate(2)
    await asyncio.sleep(100)


async def asks_twice(*, conversation, **_):
    await asyncio.gather(conversation.generate(2), conversation.generate(2))


async def cancels_itself(*, conversation, **_):
    await conversation.generate(2)
    asyncio.current_task().cancel()
    await asyncio.sleep(1)


async def appends_unknown_ids(*, conversation, **_):
    await conversation.generate(2)
    conversation.append_ids([4, 1000])


async def answers_twice(*, conversation, **_):
    await conversation.generate(2)
    conversation.append_message("tool", "1")
    conversation.append_message("tool", "2")


@pytest.mark.parametrize(
    ("loop", "message"),
    [
        (raises, r"^rollout.generation.function = mine.loop raised KeyError: 'tool' \(at the question '0\+0'\)"),
        (generates_nothing, "raised ValueError: the loop ended without a token of the policy"),
        (
            never_ends,
            r"was busy for rollout.generation.seconds = 0.5 .* at the question '0\+0'",
        ),
        (asks_twice, "raised RuntimeError: .* while an earlier call waits"),
        (cancels_itself, r"was cancelled \(at the question '0\+0'\)"),
        (appends_unknown_ids, r"raised ValueError: append_ids\(\) has the token .* with id 1000"),
        (answers_twice, r"raised RuntimeError: .* its last token is not the policy's; await generate\(\) first"),
    ],
)
def test_a_loop_that_fails_ends_the_run_with_its_name(sample, loop, message):
    with pytest.raises(ValueError, match=message):
        sample(loop, seconds=0.5)


def not_async(**_):
    pass


def test_configuration_takes_async_loops_alone(composed):
    def config(name, *more):
        return parse_config(composed(f"rollout.generation={{function: {__name__}.{name}}}", *more))

    assert generation_function(config("one_turn")) is not None and generation_function(parse_config(composed())) is None
    with pytest.raises(ConfigError, match="It is not async"):
        generation_function(config("not_async"))
    with pytest.raises(ConfigError, match=r"rollout.long_tail.*cannot be broken off"):
        tail = "rollout.long_tail={oversample: 2.0, until: useful, carry_updates: 1}"
        config("one_turn", "rollout=sglang_cpu", tail)


def test_messages_between_turns_need_a_template_that_ends_turns_with_the_stop_token(composed):
    tokenizer = arithmetic_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}{{ m['content'] }}{% endfor %}"
    renderer = PromptRenderer(tokenizer, parse_config(composed()).prompt, vocab_size=105)
    with pytest.raises(ValueError, match=r"does not end the assistant's turns .* append the text between turns"):
        renderer.between_turns([("tool", "6")])


def test_several_messages_follow_one_turn(sample, renderer):
    async def loop(*, conversation, **_):
        await conversation.generate(2)
        conversation.append_messages([("tool", "1"), ("tool", "2")])
        await conversation.generate(1)

    rollout = sample(loop)[0][0].rollout
    ((start, end),) = rollout.inserted_spans
    inserted = rollout.response_ids[start:end].tolist()
    if inserted[0] != renderer.stop_token_id:  # the policy ended its turn itself
        inserted = [renderer.stop_token_id, *inserted]
    text = "<|im_end|>\n<|im_start|>tool\n1<|im_end|>\n<|im_start|>tool\n2<|im_end|>\n<|im_start|>assistant\n"
    assert tuple(inserted) == renderer.text_ids(text)


def test_template_that_moves_the_question_between_turns_is_refused(composed):
    tokenizer = arithmetic_tokenizer()
    # The system prompt is part of the last message of the user.
    tokenizer.chat_template = (
        "{% set tools = messages | selectattr('role', 'equalto', 'tool') | list %}"
        "{% for m in messages %}{{ m['role'] }}{% if m['role'] == 'user' and not tools %}0000{% endif %}"
        "{{ m['content'] }}{% if m['role'] == 'assistant' %}<|im_end|>{% endif %}{% endfor %}"
    )
    renderer = PromptRenderer(tokenizer, parse_config(composed()).prompt, vocab_size=105)
    with pytest.raises(ValueError, match="shows the question in another way where messages follow it"):
        renderer.between_turns([("tool", "6")])


def test_a_stop_does_not_wait_for_a_busy_loop(renderer, policy, single_process):
    engine = EmbeddedEngine(
        lambda: CachedDecoder(policy, single_process, 105), stop_token_id=renderer.stop_token_id, batch_size=4
    )
    stop = StopRequest()

    async def loop(*, conversation, **_):
        await conversation.generate(2)
        stop.signal = "SIGTERM"
        await asyncio.sleep(600)

    generator = LoopGenerator(
        engine, loop, renderer, single_process, stop, name="loop", seconds=600.0, all_units_at_once=True
    )
    request = GenerationRequest(prompt_ids=(5, 6), seed=0, max_new_tokens=8, question="0+0")
    begun = time.monotonic()
    assert list(generator.generate([[request]], SAMPLING)) == []
    assert time.monotonic() - begun < 30


def test_other_ranks_get_no_tokens():
    whole = Completion(
        token_ids=(5, 6), logprobs=(-1.0, -1.0), finish_reason=FinishReason.STOP, weight_spans=(), inserted_spans=()
    )
    request = GenerationRequest(prompt_ids=(5,) * 1000, seed=0, max_new_tokens=8, question="0+0")
    outcome = _Outcome(finished=[(3, [whole])], asked={4: {1: request}})
    light = outcome.without_tokens(requests_too=True)
    assert light.finished[0][0] == 3 and light.finished[0][1][0].token_ids == ()
    assert light.asked[4][1].prompt_ids == () and outcome.asked[4][1].prompt_ids
    assert outcome.without_tokens(requests_too=False).asked == outcome.asked
