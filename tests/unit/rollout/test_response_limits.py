"""Limits of responses by a function of one's own: what ends a response, what the journal keeps, what is refused."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import pytest

from oreal_megatron.config import ConfigError, RolloutSamplingConfig, parse_config
from oreal_megatron.data.prompting import PromptRenderer
from oreal_megatron.data.tokenizer import arithmetic_tokenizer
from oreal_megatron.extensions import check_functions
from oreal_megatron.models.kv_decoder import CachedDecoder
from oreal_megatron.models.policy import build_policy
from oreal_megatron.rollout.embedded import EmbeddedEngine
from oreal_megatron.rollout.journal import RolloutJournal, unit_key
from oreal_megatron.rollout.response_limits import limits_of_step
from oreal_megatron.rollout.sample_call import can_go_on
from oreal_megatron.rollout.sampler import Sampler, rollout_seeds
from oreal_megatron.stopping import StopRequest
from oreal_megatron.types import Completion, FinishReason, GenerationRequest, Grade, Prompt, Verdict, WeightSpan
from tests.tiny_models import GEOMETRY, LOGPROB_ROUNDING, MODEL

OWN = f"{__name__}."
PROMPTS = [Prompt(id=str(n), question=f"{n}+{n}", gold_answer=str(2 * n)) for n in range(3)]
STOPS = list(range(40, 70))
"""Token ids of which a random policy soon draws one."""
CALLS = []


def by_sample(*, prompt, sample_index, step, sampling):
    """Every second sample may have three tokens and those of the step; those to prompt 2 end at STOPS."""
    CALLS.append((prompt, sample_index, step, sampling.max_new_tokens))
    limits = {"max_new_tokens": 3 + step} if sample_index else {}
    return limits | ({"stop_token_ids": STOPS} if prompt.id == "2" else {})


def sampling_of(function):
    return RolloutSamplingConfig(temperature=1.0, top_p=1.0, max_new_tokens=20, function=function)


@pytest.fixture(scope="module")
def renderer(composed):
    return PromptRenderer(arithmetic_tokenizer(), parse_config(composed()).prompt, vocab_size=105)


@pytest.fixture
def sample(renderer, single_process, tmp_path):
    """Samples two responses a prompt with an embedded engine in a new process of one directory; returns rollouts."""
    policy = build_policy(GEOMETRY, MODEL, single_process, vocab_size=105, seed=0)
    engine = EmbeddedEngine(
        lambda: CachedDecoder(policy, single_process, 105), stop_token_id=renderer.stop_token_id, batch_size=4
    )
    graded = []

    def grade(requests):
        graded.extend(requests)
        return [Grade(verdict=Verdict.CORRECT, reason="", stage="rules") for _ in requests]

    def run(function, step=0):
        graded.clear()
        sampling = sampling_of(function)
        journal = RolloutJournal(tmp_path / "journal", single_process)
        sampler = Sampler(
            engine, renderer, grade, journal, single_process, StopRequest(), max_sequence_length=64, undecided=None
        )
        groups = sampler.sample(
            PROMPTS, batch_name="step_000000", num_samples=2, sampling=sampling, seed_of=rollout_seeds(0, "train", 0),
            limits_of=limits_of_step(sampling, step),
        ).groups  # fmt: skip
        journal.close()
        return [graded.rollout for group in groups for graded in group]

    run.graded = graded
    return run


def cut(rollout, max_new_tokens, stops):
    """Returns the tokens of a response as they are under limits, and whether one of `stops` ends it."""
    tokens = rollout.response_ids.tolist()[:max_new_tokens]
    ends = [i for i, token in enumerate(tokens) if token in stops]
    return tokens[: ends[0] + 1] if ends else tokens, bool(ends)


def test_each_response_has_its_own_limits_and_is_otherwise_the_same(sample, renderer):
    free = {rollout.id: rollout for rollout in sample(None)}
    CALLS.clear()
    limited = sample(f"{OWN}by_sample", step=1)
    assert [(prompt, index, 1, 20) for prompt in PROMPTS for index in range(2)] == CALLS
    reasons = []
    for rollout in limited:
        stops = [renderer.stop_token_id, *(STOPS if rollout.prompt.id == "2" else [])]
        tokens, is_stopped = cut(free[rollout.id], 4 if rollout.sample_index else 20, stops)
        assert rollout.response_ids.tolist() == tokens
        logprobs = free[rollout.id].logprobs[: len(tokens)].tolist()
        assert rollout.logprobs.tolist() == pytest.approx(logprobs, abs=LOGPROB_ROUNDING)
        assert rollout.finish_reason is (FinishReason.STOP if is_stopped else FinishReason.LENGTH)
        reasons.append(rollout.response_ids[-1] in STOPS and rollout.prompt.id == "2")
    assert any(reasons) and any(len(rollout.response_ids) == 20 for rollout in limited)


def test_journal_keeps_a_response_as_long_as_its_limits_are_the_same(sample):
    first = sample(f"{OWN}by_sample")
    assert len(sample.graded) == 6
    again = sample(f"{OWN}by_sample")
    assert not sample.graded and [r.response_ids.tolist() for r in again] == [r.response_ids.tolist() for r in first]
    sample(f"{OWN}only_stops")
    assert len(sample.graded) == 6
    sample(None)
    assert len(sample.graded) == 6


def only_stops(**_):
    return {"stop_token_ids": (40,)}


def test_function_that_limits_nothing_has_the_journal_of_a_run_without_one(sample):
    sample(None)
    sample(f"{OWN}nothing")
    assert not sample.graded


def test_units_without_limits_of_their_own_have_the_keys_of_earlier_versions():
    prompt, request = PROMPTS[0], GenerationRequest(prompt_ids=(5, 6), seed=11, max_new_tokens=8)
    earlier = [0, {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 20}, [["0", "0+0", "0", [5, 6], 11, 8]], []]
    digest = hashlib.blake2b(json.dumps(earlier).encode(), digest_size=16).hexdigest()
    assert unit_key([prompt], [request], sampling_of(None), 0) == digest
    limited = replace(request, stop_token_ids=(7,))
    assert unit_key([prompt], [limited], sampling_of(None), 0) != digest


def nothing(**_):
    return {}


def hot(**_):
    return {"temperature": 0.5}


def long(**_):
    return {"max_new_tokens": 21}


def none_at_all(**_):
    return {"max_new_tokens": 0}


def truth(**_):
    return {"max_new_tokens": True}


def text(**_):
    return {"stop_token_ids": "</answer>"}


def beyond(**_):
    return {"stop_token_ids": [105]}


def number(**_):
    return 5


def raises(**_):
    raise KeyError("level")


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        ("hot", r"hot for response 0 to prompt 0 returned the key 'temperature' with the value 0\.5"),
        ("long", r"returned max_new_tokens = 21; .* from 1 to rollout\.sampling\.max_new_tokens = 20"),
        ("none_at_all", "returned max_new_tokens = 0; "),
        ("truth", "returned max_new_tokens = True; "),
        ("text", "returned stop_token_ids = '</answer>'; return a list of token ids"),
        (
            "beyond",
            r"stop_token_ids of rollout\.sampling\.function = .*beyond for response 0 to prompt 0 has the",
        ),
        ("number", "number for response 0 to prompt 0 returned 5; return a dict"),
        ("raises", "rollout.sampling.function = .*raises raised KeyError: 'level'"),
    ],
)
def test_wrong_limits_name_function_key_and_value(sample, function, problem):
    with pytest.raises(ValueError, match=problem):
        sample(f"{OWN}{function}")


def of_a_question(*, question):
    return {}


def test_function_of_other_arguments_is_refused_before_the_run(composed):
    (violation,) = check_functions(parse_config(composed(f"rollout.sampling.function={OWN}of_a_question")))
    assert violation.key == "rollout.sampling.function" and "prompt, sample_index, step, sampling" in violation.remedy
    with pytest.raises(ConfigError):
        limits_of_step(sampling_of("no.where"), 0)


def test_partial_response_goes_on_below_its_limit_only():
    part = Completion(
        token_ids=(1, 2),
        logprobs=(-1.0, -1.0),
        finish_reason=None,
        weight_spans=(WeightSpan(version=0, start=0, end=2),),
    )
    assert can_go_on(part, 3) and not can_go_on(part, 2)
    done = replace(part, finish_reason=FinishReason.STOP)
    assert can_go_on(done, 2) and not can_go_on(done, 1)
