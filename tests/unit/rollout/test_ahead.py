"""Rollouts ahead of training, on fake SGLang servers: what a step gets, what is under way, and what a fault costs."""

from __future__ import annotations

import functools
import itertools
import time
from types import SimpleNamespace

import pytest

from oreal_megatron.compose import composed, validated
from oreal_megatron.data.stream import PromptStream
from oreal_megatron.files import json_line
from oreal_megatron.rollout.ahead import RolloutsAhead
from oreal_megatron.rollout.journal import RolloutJournal
from oreal_megatron.rollout.sampler import Sampler
from oreal_megatron.rollout.sglang_engine import SGLangEngine
from oreal_megatron.stopping import Stopped, StopRequest
from oreal_megatron.types import Prompt
from tests.fake_sglang import fake_servers, response
from tests.run_processes import wait_until
from tests.unit.rollout.test_journal import Renderer, grade
from tests.unit.rollout.test_sglang_engine import Publisher

LENGTH, SAMPLES, PROMPTS_PER_STEP, NUM_STEPS = 20, 2, 2, 6
PROMPTS = [Prompt(id=str(i), question=f"{i}?", gold_answer=str(i)) for i in range(5)]  # an epoch ends within a batch


@functools.cache
def rollout_config(schedule, max_staleness):
    ahead = [f"rollout.schedule={schedule}", f"rollout.max_staleness={max_staleness}"]
    sizes = [f"rollout.samples_per_prompt={SAMPLES}", f"rollout.sampling.max_new_tokens={LENGTH}"]
    return validated(composed(["experiment=arithmetic_sglang", *ahead, *sizes])).rollout


class Trainer:
    """A run without models: `step` takes the rollouts of a step, calls `train`, and publishes an update."""

    def __init__(self, directory, fakes, groups, schedule, max_staleness, urls, grade, **options):
        config = rollout_config(schedule, max_staleness)
        self.stop = StopRequest()
        self.pool = fakes.pool(*urls, **options)
        self.engine = SGLangEngine(self.pool, Publisher(), groups, stop=self.stop, timeout_seconds=1.0)
        self.journal = RolloutJournal(directory / "journal", groups)
        sampler = Sampler(
            self.engine, Renderer(), grade, self.journal, groups, self.stop, max_sequence_length=64, undecided=None
        )
        self.ahead = RolloutsAhead(sampler, self.engine, groups, self.stop, config, run_seed=0, num_steps=NUM_STEPS)
        self.stream = PromptStream(PROMPTS, prompts_per_step=PROMPTS_PER_STEP, seed=0)
        self.engine.publish(0)

    def step(self, step, train=lambda: None, *, updates=True):
        sampled = self.ahead.take(step, self.stream.draw)
        train()
        self.ahead.settle()
        if updates:
            self.engine.publish(self.engine.weight_version + 1)
        return sampled

    def checkpoint(self, step):
        return self.stream.state_dict(waiting=self.ahead.waiting(step))

    def close(self):
        self.ahead.close()
        self.engine.close()
        self.journal.close()


@pytest.fixture
def fakes(tmp_path):
    with fake_servers(tmp_path) as opened:
        yield opened


@pytest.fixture
def start(fakes, tmp_path, single_process):
    """Starts trainers in one directory. Without URLs they launch a server each."""
    trainers = []

    def start_(schedule="continuous", max_staleness=1, *urls, grade=grade, **options):
        trainer = Trainer(tmp_path, fakes, single_process, schedule, max_staleness, urls, grade, **options)
        trainers.append(trainer)
        return trainer

    yield start_
    for trainer in trainers:
        trainer.close()


def prompts_of(sampled):
    return [group[0].rollout.prompt.id for group in sampled.groups]


def drawn(num_steps=NUM_STEPS):
    """The prompts of every step, as a run in turn draws them."""
    stream = PromptStream(PROMPTS, prompts_per_step=PROMPTS_PER_STEP, seed=0)
    return [[prompt.id for prompt in stream.draw()] for _ in range(num_steps)]


def assert_whole(sampled, version, bound):
    """Every response has the tokens of one that nothing interrupted, with their weights, none older than the bound."""
    for group in sampled.groups:
        assert [graded.rollout.sample_index for graded in group] == list(range(SAMPLES))
        for rollout in (graded.rollout for graded in group):
            assert tuple(rollout.response_ids.tolist()) == response(rollout.prompt_ids, LENGTH)
            spans = rollout.weight_spans
            assert spans[0].start == 0 and spans[-1].end == LENGTH
            assert all(a.end == b.start and a.version < b.version for a, b in itertools.pairwise(spans))
            assert version - bound <= spans[0].version and spans[-1].version <= version


def content(sampled):
    return [[json_line(graded.to_json()) for graded in group] for group in sampled.groups]


@pytest.mark.parametrize(("schedule", "bound"), [("one_ahead", 1), ("continuous", 1), ("continuous", 3)])
def test_steps_train_the_prompts_of_a_run_in_turn_within_the_bound(start, schedule, bound):
    trainer = start(schedule, bound)
    sampled = [trainer.step(step, lambda: time.sleep(0.02)) for step in range(NUM_STEPS)]
    assert [prompts_of(each) for each in sampled] == drawn()
    for step, each in enumerate(sampled):
        assert_whole(each, step, bound)
        assert each.metrics["rollout/oldest_updates"] <= bound and each.metrics["rollout/discarded_tokens"] == 0
    assert max(each.metrics["rollout/oldest_updates"] for each in sampled) == bound
    assert not trainer.ahead.waiting(NUM_STEPS)  # no batch is drawn for a step that there is not


def test_one_ahead_completes_the_next_step_while_this_one_trains_and_before_new_weights(fakes, start):
    trainer = start("one_ahead", 1)
    server = fakes.last(0)
    everything = 2 * PROMPTS_PER_STEP * SAMPLES
    trainer.step(0, lambda: wait_until(lambda: len(server.prompts) == everything))
    server.token_seconds = 0.02  # generation is under way when the next steps have trained
    for step in range(1, 4):
        sampled = trainer.step(step)
        spans = {graded.rollout.weight_spans for group in sampled.groups for graded in group}
        assert [[(span.version, span.end) for span in each] for each in spans] == [[(step - 1, LENGTH)]]
        assert sampled.metrics["rollout/mean_updates"] == sampled.metrics["rollout/older_tokens"] == 1.0


def test_bound_ends_admission(fakes, start):
    trainer = start("continuous", 2)
    server = fakes.last(0)
    per_step = PROMPTS_PER_STEP * SAMPLES

    def train():
        wait_until(lambda: not server_is_busy(trainer))
        time.sleep(0.05)

    for step in range(3):
        sampled = trainer.step(step, train)
        assert len(server.prompts) == (step + 3) * per_step
    assert sampled.metrics["rollout/groups_ahead"] <= 2 * PROMPTS_PER_STEP


def server_is_busy(trainer):
    return any(batch.unfinished for batch in trainer.ahead._batches)


def test_publication_in_the_middle_of_a_group_keeps_its_tokens(fakes, start):
    trainer = start("continuous", 2)
    server = fakes.last(0)
    trainer.ahead.take(0, trainer.stream.draw)
    server.token_seconds = 0.02
    trainer.ahead.settle()
    trainer.engine.publish(1)
    trainer.step(1, lambda: time.sleep(0.1))
    for step in (2, 3):
        sampled = trainer.step(step, lambda: time.sleep(0.1))
        assert_whole(sampled, step, 2)
        assert any(len(graded.rollout.weight_spans) > 1 for group in sampled.groups for graded in group)
        assert 0 < sampled.metrics["rollout/mean_updates"] <= 2
    # No request asks again for the tokens that there were.
    assert any(len(ids) > 2 and ids[2:] == response(ids[:2], len(ids) - 2) for ids in server.prompts)


def test_step_without_an_update_makes_nothing_older(start):
    trainer = start("continuous", 1)
    sampled = [trainer.step(step, updates=False) for step in range(4)]
    assert [prompts_of(each) for each in sampled] == drawn(4)
    assert all(each.metrics["rollout/oldest_updates"] == 0 for each in sampled)


@pytest.mark.parametrize(("schedule", "bound"), [("one_ahead", 1), ("continuous", 2)])
@pytest.mark.parametrize("while_", ["training", "waiting"])
def test_lost_server_restarts_gets_weights_and_costs_no_response(fakes, start, schedule, bound, while_):
    trainer = start(schedule, bound)
    first = fakes.last(0)
    first.token_seconds = 0.005 if while_ == "training" else 0.02

    def die():
        wait_until(lambda: len(first.prompts) > PROMPTS_PER_STEP * SAMPLES)
        fakes.kill(first)

    if while_ == "waiting":
        fakes.loop.call_soon_threadsafe(lambda: fakes.loop.call_later(0.1, first.die))
    sampled = [trainer.step(0, die if while_ == "training" else lambda: None)]
    sampled += [trainer.step(step) for step in range(1, 4)]
    assert [prompts_of(each) for each in sampled] == drawn(4) and len(fakes.started) == 2
    for step, each in enumerate(sampled):
        assert_whole(each, step, bound)


def test_other_server_takes_the_work_of_a_lost_server(fakes, start):
    servers = [fakes.server(token_seconds=0.005) for _ in range(2)]
    trainer = start("continuous", 2, *(server.url for server in servers))
    trainer.step(0, lambda: fakes.kill(servers[0]))
    for step in (1, 2, 3):
        assert_whole(trainer.step(step), step, 2)


@pytest.mark.parametrize(("schedule", "bound"), [("one_ahead", 1), ("continuous", 2)])
def test_stop_while_ahead_ends_at_once_and_keeps_the_prompts(fakes, start, schedule, bound):
    trainer = start(schedule, bound)
    trainer.ahead.take(0, trainer.stream.draw)
    fakes.last(0).token_seconds = 60
    fakes.last(0).break_("/abort_request", "hang")
    trainer.stop.signal = "SIGTERM"
    begin = time.monotonic()
    trainer.ahead.settle()
    trainer.engine.publish(1)
    with pytest.raises(Stopped, match="stopped while step_000001 was generated"):
        trainer.ahead.take(1, trainer.stream.draw)
    assert time.monotonic() - begin < 5
    resumed = PromptStream(PROMPTS, prompts_per_step=PROMPTS_PER_STEP, seed=0)
    resumed.load_state_dict(trainer.checkpoint(1))
    assert [[prompt.id for prompt in resumed.draw()] for _ in range(4)] == drawn()[1:5]


@pytest.mark.parametrize(("schedule", "bound"), [("one_ahead", 1), ("continuous", 2)])
@pytest.mark.parametrize("checkpoint", [0, 1, 2])
def test_killed_run_goes_on_with_the_journal_and_trains_every_prompt_once(fakes, start, schedule, bound, checkpoint):
    killed = start(schedule, bound)
    saved = killed.checkpoint(0)
    before = {}
    for step in range(3):
        if step == checkpoint:
            saved = killed.checkpoint(step)
        before[step] = killed.step(step, lambda: time.sleep(0.03))
    killed.ahead.take(3, killed.stream.draw)
    killed.close()
    num_asked = sum(len(server.prompts) for _, server in fakes.started)
    resumed = start(schedule, bound)
    resumed.stream.load_state_dict(saved)
    for version in range(1, checkpoint + 1):
        resumed.engine.publish(version)
    after = {step: resumed.step(step) for step in range(checkpoint, NUM_STEPS)}
    assert [prompts_of(each) for each in after.values()] == drawn()[checkpoint:]
    for step, each in after.items():
        assert_whole(each, step, bound)
    # The steps that the journal has whole are the same, spans and all.
    assert all(content(after[step]) == content(before[step]) for step in before if step >= checkpoint)
    assert sum(len(server.prompts) for _, server in fakes.started) - num_asked <= 3 * PROMPTS_PER_STEP * SAMPLES


def test_journalled_responses_beyond_the_bound_are_generated_again(start):
    first = start("continuous", 1)
    first.ahead.take(0, first.stream.draw)
    first.ahead._wait(lambda: not server_is_busy(first))
    first.close()
    again = start("continuous", 1)
    for version in range(1, 4):
        again.engine.publish(version)
    sampled = again.ahead.take(0, again.stream.draw)
    assert sampled.metrics["rollout/discarded_tokens"] == 2 * PROMPTS_PER_STEP * SAMPLES * LENGTH
    assert_whole(sampled, 3, 0)


def test_error_of_the_thread_that_grades_is_raised_by_the_next_call(start):
    def failing(requests):
        if len(seen) >= PROMPTS_PER_STEP:
            raise OSError("No space left on device")
        seen.append(requests)
        return grade(requests)

    seen = []
    trainer = start("one_ahead", 1, grade=failing)
    with pytest.raises(OSError, match="No space left"):
        trainer.step(0)


def test_refused_prompt_is_raised_by_the_next_call(fakes, start):
    server = fakes.server()
    server.break_("/generate", "status", 400)
    trainer = start("continuous", 1, server.url)
    with pytest.raises(ValueError, match="answered 400"):
        trainer.ahead.take(0, trainer.stream.draw)


def test_error_of_another_replica_is_raised_on_this_one(start, single_process, monkeypatch):
    trainer = start("continuous", 1)
    gather = type(single_process).gather_over_world

    def with_other(groups, mine):
        other = SimpleNamespace(
            **{**vars(mine[0]), "error": ConnectionError("no server of replica 1"), "is_done": True}
        )
        return [*gather(groups, mine), [other]]

    monkeypatch.setattr(type(single_process), "gather_over_world", with_other)
    with pytest.raises(ConnectionError, match="replica 1"):
        trainer.ahead.take(0, trainer.stream.draw)


def test_evaluation_between_two_steps_has_the_servers_alone(start):
    trainer = start("continuous", 2)
    trainer.step(0)
    assert trainer.ahead._generation is None
    requests = [request for batch in trainer.ahead._batches for request in batch.call.requests][:2]
    found = dict(trainer.engine.generate([requests], trainer.ahead._config.sampling))
    assert [completion.weight_spans[0].version for completion in found[0]] == [1, 1]
