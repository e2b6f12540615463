"""A step that goes on without its slowest responses: what it trains on, what is kept, what a killed step does again."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest

from oreal_megatron.config import SamplingConfig
from oreal_megatron.data.stream import PromptStream
from oreal_megatron.rollout.early_stop import EarlyStop
from oreal_megatron.rollout.engine import units_by_prompt
from oreal_megatron.rollout.journal import RolloutJournal
from oreal_megatron.rollout.sampler import Sampler, rollout_seeds
from oreal_megatron.servers.request_queue import NOTHING
from oreal_megatron.stopping import StopRequest
from oreal_megatron.types import Completion, FinishReason, Prompt, WeightSpan
from tests.unit.rollout.test_journal import Renderer, content, grade

LENGTH = 6
PROMPTS = [Prompt(id=str(i), question=f"{i}?", gold_answer=str(i)) for i in range(6)]


class Engine:
    """A unit a prompt, finished in order; what is broken off has three tokens more than before."""

    def __init__(self):
        self.weight_version = 0
        self.num_tokens = 0

    def units(self, requests):
        return units_by_prompt(requests)

    def generate(self, units, sampling, is_enough=None):
        for index, requests in enumerate(units):
            broken_off = is_enough is not None and is_enough()
            yield index, [self._completion(request, 3 if broken_off else LENGTH) for request in requests]

    def _completion(self, request, num_tokens):
        partial = request.partial or NOTHING
        if partial.finish_reason is not None:
            return partial
        start, end = len(partial.token_ids), min(len(partial.token_ids) + num_tokens, LENGTH)
        self.num_tokens += end - start
        return Completion(
            token_ids=partial.token_ids + (self.weight_version,) * (end - start),
            logprobs=partial.logprobs + (-0.5,) * (end - start),
            finish_reason=FinishReason.STOP if end == LENGTH else None,
            weight_spans=(*partial.weight_spans, WeightSpan(version=self.weight_version, start=start, end=end)),
        )


@pytest.fixture
def run(tmp_path, single_process):
    """Samples 2 responses a prompt in a new process of the same directory, until there are 4 groups."""

    def sample(engine, prompts=PROMPTS, step=3, counts=lambda group: True, max_staleness=1, num_groups=4, grade=grade):
        journal = RolloutJournal(tmp_path / "journal", single_process)
        sampler = Sampler(
            engine, Renderer(), grade, journal, single_process, StopRequest(), max_sequence_length=64, undecided=None
        )
        try:
            return sampler.sample(
                prompts,
                batch_name=f"step_{step:06d}",
                num_samples=2,
                sampling=SamplingConfig(temperature=1.0, top_p=0.9, max_new_tokens=LENGTH),
                seed_of=rollout_seeds(0, "train", step),
                early_stop=EarlyStop(
                    num_groups=num_groups, counts=counts, max_staleness=max_staleness, next_batch=f"step_{step + 1:06d}"
                ),
            )
        finally:
            journal.close()

    return sample


def ids_of(sampled):
    return [group[0].rollout.prompt.id for group in sampled.groups]


def test_step_ends_early_and_the_next_goes_on_with_the_rest(run):
    first = run(Engine())
    assert ids_of(first) == ["0", "1", "2", "3"] and [p.id for p in first.unfinished] == ["4", "5"]
    assert first.metrics["rollout/asked_groups"] == 6 and first.metrics["rollout/unfinished_groups"] == 2
    assert first.metrics["rollout/unfinished_tokens"] == 2 * 2 * 3 and first.metrics["rollout/older_tokens"] == 0
    engine = Engine()
    engine.weight_version = 1
    second = run(engine, [*first.unfinished, *PROMPTS[:2]], step=4)
    assert ids_of(second) == ["4", "5", "0", "1"] and not second.unfinished
    rollout = second.groups[0][1].rollout
    assert rollout.response_ids.tolist() == [0, 0, 0, 1, 1, 1] and rollout.logprobs.tolist() == [-0.5] * 6
    assert rollout.weight_spans == (WeightSpan(version=0, start=0, end=3), WeightSpan(version=1, start=3, end=6))
    assert engine.num_tokens == 2 * 2 * 3 + 2 * 2 * 6
    assert second.metrics["rollout/carried_responses"] == 4 and second.metrics["rollout/carried_tokens"] == 12
    assert second.metrics["rollout/older_tokens"] == 12 / 48 and second.metrics["rollout/oldest_updates"] == 1


def test_tokens_of_too_stale_weights_are_discarded(run):
    rest = run(Engine()).unfinished
    engine = Engine()
    engine.weight_version = 1
    second = run(engine, rest, step=4, max_staleness=0)
    assert second.groups[0][0].rollout.weight_spans == (WeightSpan(version=1, start=0, end=6),)
    assert (second.metrics["rollout/carried_tokens"], second.metrics["rollout/discarded_tokens"]) == (0, 12)


def test_without_an_update_nothing_is_too_stale(run):
    rest = run(Engine()).unfinished
    second = run(Engine(), rest, step=4, max_staleness=0)
    assert second.groups[0][0].rollout.weight_spans[0] == WeightSpan(version=0, start=0, end=3)
    assert second.metrics["rollout/carried_tokens"] == 12 and second.metrics["rollout/older_tokens"] == 0


def test_only_useful_groups_count_and_all_complete_ones_return(run):
    def is_odd(group):
        return int(group[0].rollout.prompt.id) % 2 == 1

    sampled = run(Engine(), counts=is_odd, num_groups=2)
    assert ids_of(sampled) == ["0", "1", "2", "3"] and [p.id for p in sampled.unfinished] == ["4", "5"]
    assert ids_of(run(Engine(), step=5, counts=is_odd)) == ["0", "1", "2", "3", "4", "5"]  # never enough: all


def test_repeated_step_has_the_same_groups_and_the_same_rest(run, tmp_path):
    first = run(Engine())
    kept = (tmp_path / "journal" / "step_000004.begun.jsonl").read_bytes()
    again = Engine()
    repeated = run(again)
    assert content(repeated.groups) == content(first.groups)
    assert repeated.unfinished == first.unfinished and again.num_tokens == 0
    assert (tmp_path / "journal" / "step_000004.begun.jsonl").read_bytes() == kept
    engine = Engine()
    engine.weight_version = 1
    second = run(engine, [*first.unfinished, *PROMPTS[:2]], step=4)
    resumed = Engine()
    resumed.weight_version = 1
    repeated = run(resumed, [*first.unfinished, *PROMPTS[:2]], step=4)
    assert content(repeated.groups) == content(second.groups) and not resumed.num_tokens


def test_killed_step_generates_the_missing_groups_alone(run):
    class Killed(Exception):
        pass

    def dying(requests):
        dying.calls += 1
        if dying.calls == 3:
            raise Killed
        return grade(requests)

    dying.calls = 0
    with pytest.raises(Killed):
        run(Engine(), grade=dying)
    again = Engine()
    sampled = run(again)
    assert ids_of(sampled) == ["0", "1", "2", "3"] and again.num_tokens == 2 * 2 * 6 + 2 * 2 * 3


def test_finished_response_of_an_unfinished_group_is_kept(run, tmp_path):
    rest = run(Engine()).unfinished
    path = tmp_path / "journal" / "step_000004.begun.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    records[0]["completion"]["finish_reason"] = "length"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    rollouts = [graded.rollout for graded in run(Engine(), rest, step=4).groups[0]]
    assert [len(rollout.response_ids) for rollout in rollouts] == [3, 6]
    assert [rollout.finish_reason for rollout in rollouts] == [FinishReason.LENGTH, FinishReason.STOP]


def test_damaged_partial_response_is_generated_again(run, tmp_path):
    rest = run(Engine()).unfinished
    path = tmp_path / "journal" / "step_000004.begun.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(["\0" * 40 + "\n", *lines[1:]]))
    engine = Engine()
    assert len(run(engine, rest, step=4).groups) == 2 and engine.num_tokens == 6 + 3 * 3


def test_stream_loses_no_prompt_and_trains_none_twice():
    """Each step puts back a random few of its prompts; halfway the run is resumed from a checkpoint."""
    prompts = [Prompt(id=f"p{i}", question="q", gold_answer="1") for i in range(40)]
    stream, rng, trained = PromptStream(prompts, prompts_per_step=6, seed=0), random.Random(0), []
    for step in range(60):
        drawn = stream.draw()
        unfinished = [prompt for prompt in drawn if rng.random() < 0.3]
        trained += [prompt.id for prompt in drawn if prompt not in unfinished]
        stream.put_back(unfinished)
        if step == 30:
            state = json.loads(json.dumps(stream.state_dict()))
            stream = PromptStream(prompts, prompts_per_step=6, seed=0)
            stream.load_state_dict(state)
    counts = Counter(trained)
    assert len(counts) == 40 and max(counts.values()) - min(counts.values()) <= 1
