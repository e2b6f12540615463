"""Rollouts ahead of training, on fake SGLang servers: what a step gets, what is under way, and what a fault costs."""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from oreal_megatron.compose import composed, validated
from oreal_megatron.config import UndecidedConfig
from oreal_megatron.data.stream import PromptStream
from oreal_megatron.distributed.step_timer import StepTimer
from oreal_megatron.files import json_line
from oreal_megatron.rollout import ahead
from oreal_megatron.rollout.ahead import RolloutsAhead
from oreal_megatron.rollout.journal import RolloutJournal
from oreal_megatron.rollout.sampler import Sampler, rollout_seeds
from oreal_megatron.rollout.sglang_engine import SGLangEngine
from oreal_megatron.run_state import RunProgress
from oreal_megatron.step_rollouts import rolled_out
from oreal_megatron.stopping import Stopped, StopRequest, TooManyUndecided
from oreal_megatron.types import Grade, Prompt, Verdict
from tests.fake_sglang import fake_servers, response
from tests.run_processes import wait_until
from tests.unit.rollout.test_journal import Renderer, grade
from tests.unit.rollout.test_sglang_engine import Publisher

LENGTH, SAMPLES, PROMPTS_PER_STEP, NUM_STEPS = 20, 2, 2, 6
PROMPTS = [Prompt(id=str(i), question=f"{i}?", gold_answer=str(i)) for i in range(5)]  # an epoch ends within a batch


@functools.cache
def rollout_config(schedule, max_staleness):
    ahead = [f"rollout.schedule={schedule}", f"rollout.max_staleness={max_staleness or 'null'}"]
    sizes = [f"rollout.samples_per_prompt={SAMPLES}", f"rollout.sampling.max_new_tokens={LENGTH}"]
    return validated(composed(["experiment=arithmetic_sglang", *ahead, *sizes])).rollout


class Trainer:
    """A run without models: `step` takes the rollouts of a step, calls `train`, and publishes an update."""

    def __init__(self, directory, fakes, groups, schedule, max_staleness, urls, grade, undecided, **options):
        config = rollout_config(schedule, max_staleness)
        self.stop = StopRequest()
        self.pool = fakes.pool(*urls, **options)
        self.engine = SGLangEngine(self.pool, Publisher(), groups, stop=self.stop, timeout_seconds=1.0)
        self.journal = RolloutJournal(directory / "journal", groups)
        limits = {"max_sequence_length": 64, "undecided": undecided}
        self.sampler = Sampler(self.engine, Renderer(), grade, self.journal, groups, self.stop, **limits)
        self.ahead = RolloutsAhead(
            self.sampler, self.engine, groups, self.stop, config, run_seed=0, num_steps=NUM_STEPS
        )
        self.stream = PromptStream(PROMPTS, prompts_per_step=PROMPTS_PER_STEP, seed=0)
        self.engine.publish(0)

    def step(self, step, train=lambda: None, *, updates=True):
        sampled = self.ahead.take(step, self.stream.draw)
        train()
        if updates:
            self.publish()
            self.ahead.begin(step + 1, self.stream.draw)
        return sampled

    def publish(self):
        self.ahead.settle()
        self.ahead.publish(self.engine.weight_version + 1)

    def resume(self, step, state):
        """Goes to a checkpoint of a run with an update a step."""
        self.stream.load_state_dict(state)
        for version in range(1, step + 1):
            self.engine.publish(version)

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

    def start_(schedule="continuous", max_staleness=1, *urls, grade=grade, undecided=None, **options):
        trainer = Trainer(tmp_path, fakes, single_process, schedule, max_staleness, urls, grade, undecided, **options)
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
        wait_until(lambda: all_are_graded(trainer))
        time.sleep(0.05)
        # Before the publication, after which the requests of another step may come at any moment.
        assert len(server.prompts) == (step + 3) * per_step

    for step in range(3):
        trainer.step(step, train)
    wait_until(lambda: all_are_graded(trainer))
    sampled = trainer.ahead.take(3, trainer.stream.draw)
    assert sampled.metrics["rollout/groups_ahead"] == 2 * PROMPTS_PER_STEP


def all_are_graded(trainer):
    return all(batch.is_graded for batch in trainer.ahead._batches)


def is_generating(trainer):
    return trainer.ahead._background.is_running


def test_publication_in_the_middle_of_a_group_keeps_its_tokens(fakes, start):
    trainer = start("continuous", 2)
    server = fakes.last(0)
    trainer.ahead.take(0, trainer.stream.draw)
    server.token_seconds = 0.05
    trainer.publish()
    trainer.step(1, lambda: time.sleep(0.1))
    cut, updates = 0, []
    for step in (2, 3):
        sampled = trainer.step(step, lambda: time.sleep(0.1))
        assert_whole(sampled, step, 2)
        cut += sum(len(graded.rollout.weight_spans) > 1 for group in sampled.groups for graded in group)
        updates.append(sampled.metrics["rollout/mean_updates"])
    # On a busy machine one of the publications may come when all responses are complete.
    assert cut and 0 < max(updates) <= 2
    wait_until(lambda: all_are_graded(trainer))
    assert server.num_tokens == NUM_STEPS * PROMPTS_PER_STEP * SAMPLES * LENGTH  # no token is generated twice
    assert all(len(ids) == 2 for ids in server.prompts)  # every response is one request, which waits at the server
    assert set(server.pauses) == {"retract"} and "/flush_cache" in server.calls
    assert trainer.pool.num_retries == 0


def test_response_that_keeps_its_cache_counts_as_of_the_weights_that_began_it(fakes, start):
    trainer = start("continuous", 2, keep_cache=True)
    server = fakes.last(0)
    trainer.ahead.take(0, trainer.stream.draw)
    server.token_seconds = 0.05
    trainer.publish()
    older = 0.0
    for step in (1, 2, 3):
        sampled = trainer.step(step, lambda: time.sleep(0.1))
        assert_whole(sampled, step, 2)
        assert all(len(graded.rollout.weight_spans) == 1 for group in sampled.groups for graded in group)
        older = max(older, sampled.metrics["rollout/older_tokens"])
    assert older > 0 and set(server.pauses) == {"in_place"} and "/flush_cache" not in server.calls
    # Requests of other weights do not read each other's prefixes.
    assert len(set(server.cache_keys)) >= 3 and set(server.cache_keys) <= {trainer.pool.label(v) for v in range(5)}
    wait_until(lambda: all_are_graded(trainer))
    assert all(len(ids) == 2 for ids in server.prompts) and trainer.pool.num_retries == 0


@pytest.mark.parametrize("keep_cache", [False, True])
def test_server_that_misses_an_update_loses_its_requests_to_the_other(fakes, start, keep_cache):
    servers = [fakes.server(token_seconds=0.02) for _ in range(2)]
    trainer = start("continuous", 2, *(server.url for server in servers), keep_cache=keep_cache)
    trainer.ahead.begin(0, trainer.stream.draw)
    wait_until(lambda: all(server.num_running for server in servers))
    servers[0].break_("/end_weight_update", "status", 500)
    trainer.publish()
    servers[0].mend()
    for step in range(3):  # each with the publication before the first
        assert_whole(trainer.step(step), step + 1, 3)
    assert trainer.pool.num_retries > 0


def test_answer_of_weights_older_than_its_request_is_asked_for_again(fakes, start):
    servers = [fakes.server(token_seconds=0.002) for _ in range(2)]
    trainer = start("continuous", 1, *(server.url for server in servers))
    trainer.step(0, lambda: wait_until(lambda: all_are_graded(trainer)))
    servers[0].answer_label = trainer.pool.label(0)  # it says that it has the new weights, and generates with the old
    trainer.step(1)
    sampled = trainer.step(2)
    assert_whole(sampled, 2, 1)
    assert trainer.pool.num_retries > 0
    spans = [span for group in sampled.groups for graded in group for span in graded.rollout.weight_spans]
    assert min(span.version for span in spans) >= 1


def test_long_update_does_not_make_a_paused_server_lost(fakes, start):
    trainer = start("continuous", 2, health_seconds=0.5)
    server = fakes.last(0)
    server.token_seconds = 0.05
    trainer.ahead.take(0, trainer.stream.draw)
    server.break_("/end_weight_update", "delay", 1.5, times=1)
    server.break_("/health", "hang")
    mending = threading.Timer(1.4, server.mend)
    mending.start()
    trainer.publish()
    mending.join()
    assert_whole(trainer.step(1), 1, 2)
    assert trainer.pool.num_retries == 0 and len(fakes.started) == 1


def test_steps_without_an_update_interrupt_nothing_and_make_nothing_older(fakes, start):
    trainer = start("continuous", 2)
    server = fakes.last(0)
    server.token_seconds = 0.005
    sampled = [trainer.step(step, updates=False) for step in range(4)]
    wait_until(lambda: all_are_graded(trainer))
    assert [prompts_of(each) for each in sampled] == drawn(4)
    assert all(each.metrics["rollout/oldest_updates"] == 0 for each in sampled)
    assert server.prompts and all(len(ids) == 2 for ids in server.prompts)  # every response is one request


def test_servers_generate_from_a_publication_on_and_the_idle_share_counts_everything_between(fakes, start):
    trainer = start("continuous", 1)
    server = fakes.last(0)
    trainer.step(0)
    server.token_seconds = 0.02
    trainer.step(1)
    num_asked = len(server.prompts)
    wait_until(lambda: len(server.prompts) > num_asked)  # nothing takes the next step yet
    server.token_seconds = 0.001
    wait_until(lambda: all_are_graded(trainer))
    time.sleep(1.5)  # a checkpoint, for example
    assert 0.5 < trainer.ahead.take(2, trainer.stream.draw).metrics["rollout/server_idle_share"] < 1
    server.token_seconds = 0.1
    trainer.publish()
    trainer.ahead.begin(3, trainer.stream.draw)
    time.sleep(1.0)
    assert trainer.ahead.take(3, trainer.stream.draw).metrics["rollout/server_idle_share"] < 0.5


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


@pytest.mark.parametrize("has_own_units", [True, False])
def test_all_servers_lost_while_another_replica_waits(fakes, start, single_process, monkeypatch, has_own_units):
    """The main process notices the loss and sends the weights again, also where its own replica has no request left."""
    trainer = start("continuous", 1)
    gather = type(single_process).gather_over_world

    def with_other(groups, mine):
        states = gather(groups, mine)
        if mine and hasattr(mine[0], "has_no_weights"):
            # The other replica gets its answer from the second server; it ends its generation when this one does.
            is_answered = len(fakes.started) > 1 and all(trainer.pool.has_weights.values())
            is_done = is_answered or trainer.ahead._background._must_end.is_set()
            states.append([replace(mine[0], is_done=is_done, has_no_weights=False)])
        return states

    monkeypatch.setattr(type(single_process), "gather_over_world", with_other)

    def die():
        if not has_own_units:
            wait_until(lambda: all_are_graded(trainer))
        fakes.kill(fakes.last(0))

    killer = threading.Timer(0.1, die)
    killer.start()
    begin = time.monotonic()
    assert_whole(trainer.ahead.take(0, trainer.stream.draw), 0, 0)
    killer.join()
    assert len(fakes.started) == 2 and time.monotonic() - begin < 10


def test_servers_get_the_weights_again_though_the_step_is_complete(fakes, start):
    trainer = start("continuous", 1)
    trainer.step(0)
    wait_until(lambda: all_are_graded(trainer))
    fakes.kill(fakes.last(0))
    wait_until(lambda: trainer.ahead._background.has_no_weights)
    trainer.ahead.take(1, trainer.stream.draw)
    assert all(trainer.pool.has_weights.values()) and is_generating(trainer)


@pytest.mark.parametrize(("schedule", "bound"), [("one_ahead", 1), ("continuous", 2)])
def test_stop_while_ahead_ends_at_once_and_keeps_prompts_and_responses(fakes, start, schedule, bound):
    trainer = start(schedule, bound)
    server = fakes.last(0)
    trainer.ahead.take(0, trainer.stream.draw)
    server.token_seconds = 0.05
    trainer.publish()
    trainer.ahead.begin(1, trainer.stream.draw)
    num_tokens = server.num_tokens
    time.sleep(0.5)
    server.token_seconds = 60
    trainer.stop.signal = "SIGTERM"
    begin = time.monotonic()
    with pytest.raises(Stopped, match="stopped while step_000001 was generated"):
        trainer.ahead.take(1, trainer.stream.draw)
    trainer.ahead.keep()
    assert time.monotonic() - begin < 5 and not is_generating(trainer)
    saved = trainer.checkpoint(1)
    resumed = PromptStream(PROMPTS, prompts_per_step=PROMPTS_PER_STEP, seed=0)
    resumed.load_state_dict(saved)
    assert [[prompt.id for prompt in resumed.draw()] for _ in range(4)] == drawn()[1:5]
    trainer.close()
    begun = server.num_tokens - num_tokens
    assert begun > 0
    again = start(schedule, bound)
    again.resume(1, saved)
    for step in range(1, NUM_STEPS):
        assert_whole(again.step(step), step, bound)
    # The tokens of the first start are not generated again.
    num_generated = sum(server.num_tokens for _, server in fakes.started)
    assert num_generated == NUM_STEPS * PROMPTS_PER_STEP * SAMPLES * LENGTH


def test_stop_does_not_wait_for_grades_and_keeps_what_has_none(fakes, start):
    def slow(requests):
        time.sleep(1.0)
        return grade(requests)

    trainer = start("continuous", 2, grade=slow)
    trainer.ahead.begin(0, trainer.stream.draw)
    wait_until(lambda: all(batch.is_served for batch in trainer.ahead._batches))
    trainer.stop.signal = "SIGTERM"
    begin = time.monotonic()
    trainer.ahead.settle()
    trainer.ahead.keep()
    trainer.close()
    assert time.monotonic() - begin < 2.5  # the unit that is being graded, of six
    num_tokens = fakes.last(0).num_tokens
    again = start("continuous", 2)
    assert_whole(again.ahead.take(0, again.stream.draw), 0, 0)
    assert num_tokens == 3 * PROMPTS_PER_STEP * SAMPLES * LENGTH and fakes.last(0).num_tokens == 0


def test_server_that_does_not_return_what_it_has_cannot_hold_up_the_end(fakes, start, monkeypatch):
    monkeypatch.setattr(ahead, "_KEEP_SECONDS", 0.3)
    trainer = start("continuous", 1)
    fakes.last(0).break_("/generate", "hang")
    trainer.ahead.begin(0, trainer.stream.draw)
    wait_until(lambda: trainer.ahead._background.busy_seconds() > 0.1)
    begin = time.monotonic()
    trainer.ahead.keep()
    assert time.monotonic() - begin < 3 and not is_generating(trainer)


def test_publication_does_not_wait_for_grades(start):
    def slow(requests):
        time.sleep(0.5)
        return grade(requests)

    trainer = start("continuous", 2, grade=slow)
    trainer.ahead.take(0, trainer.stream.draw)
    wait_until(lambda: all(batch.is_served for batch in trainer.ahead._batches))
    begin = time.monotonic()
    trainer.publish()
    assert time.monotonic() - begin < 1.0 and not all_are_graded(trainer)
    trainer.ahead.begin(1, trainer.stream.draw)
    assert_whole(trainer.ahead.take(1, trainer.stream.draw), 1, 2)
    assert len(trainer.journal.read("step_000001")) == PROMPTS_PER_STEP


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
    resumed.resume(checkpoint, saved)
    after = {step: resumed.step(step) for step in range(checkpoint, NUM_STEPS)}
    assert [prompts_of(each) for each in after.values()] == drawn()[checkpoint:]
    for step, each in after.items():
        assert_whole(each, step, bound)
    # The steps that the journal has whole are the same, spans and all.
    assert all(content(after[step]) == content(before[step]) for step in before if step >= checkpoint)
    assert sum(len(server.prompts) for _, server in fakes.started) - num_asked <= 3 * PROMPTS_PER_STEP * SAMPLES


@pytest.fixture
def stopped(start):
    """A run with a bound of 4, stopped after step 0 with all of steps 1 to 4 and a part of step 5; its checkpoint."""
    trainer = start("continuous", 4)
    trainer.step(0, lambda: wait_until(lambda: all_are_graded(trainer)))
    trainer.stop.signal = "SIGTERM"
    trainer.ahead.keep()
    saved = trainer.checkpoint(1)
    trainer.close()
    return saved


def test_resume_with_a_smaller_bound_generates_again_what_is_too_old(start, stopped):
    per_step = PROMPTS_PER_STEP * SAMPLES * LENGTH
    again = start("continuous", 1)
    again.resume(1, stopped)
    sampled = {step: again.step(step) for step in range(1, NUM_STEPS)}
    assert [prompts_of(each) for each in sampled.values()] == drawn()[1:]
    for step, each in sampled.items():
        assert_whole(each, step, 1)
    # Step 1 may train the tokens of version 0, steps 2 to 4 may not. That each batch is drawn a step ahead shows where
    # its tokens are counted.
    discarded = [each.metrics["rollout/discarded_tokens"] for each in sampled.values()]
    assert discarded[:3] == [per_step] * 3 and discarded[3] <= per_step and discarded[4] == 0
    assert sampled[1].metrics["rollout/oldest_updates"] == 1
    # A further start reads the new rollouts, whatever file they are in.
    kept = again.journal.read("step_000003")
    again.close()
    third = start("continuous", 1)
    third.resume(3, again.checkpoint(3))
    third.stream.load_state_dict(stopped)
    third.stream.draw(), third.stream.draw()
    read = third.ahead.take(3, third.stream.draw)
    assert read.metrics["rollout/discarded_tokens"] == 0 and set(kept) == set(third.ahead._batches[0].call.keys)


def test_resume_in_turn_trains_the_prompts_that_were_drawn(start, stopped):
    again = start("continuous", 4)
    again.resume(1, stopped)
    sampled = [
        again.sampler.sample(
            again.stream.draw(),
            batch_name=f"step_{step:06d}",
            num_samples=SAMPLES,
            sampling=again.ahead._config.sampling,
            seed_of=rollout_seeds(0, "train", step),
        )
        for step in (1, 2)
    ]
    assert [prompts_of(each) for each in sampled] == drawn()[1:3]
    for each in sampled:
        assert_whole(each, 1, 0)


def test_partial_responses_of_later_weights_than_the_checkpoint_are_not_continued(fakes, start):
    trainer = start("continuous", 2)
    saved = trainer.checkpoint(0)
    trainer.step(0)
    fakes.last(0).token_seconds = 0.05
    trainer.step(1)
    time.sleep(0.3)
    trainer.ahead.keep()
    trainer.close()
    again = start("continuous", 2)
    again.resume(0, saved)  # the checkpoints of the steps after it were damaged
    for step in range(4):
        assert_whole(again.step(step), step, 2)


LIMITS = UndecidedConfig(warn=0.1, stop=0.5)


def undecided(requests):
    return [Grade(verdict=Verdict.UNDECIDED, reason="the judge is down", stage="judge") for _ in requests]


def rolled_out_of(trainer, step):
    """rolled_out of a run that has no models."""
    run = SimpleNamespace(
        config=None, progress=RunProgress(step=step), stream=trainer.stream, engine=trainer.engine,
        policy=SimpleNamespace(on_device=contextlib.nullcontext), ahead=trainer.ahead, sampler=trainer.sampler,
    )  # fmt: skip
    return rolled_out(run, StepTimer())


def test_what_a_judge_left_undecided_ahead_is_graded_again_after_one_restart(start):
    down = start("continuous", 3, grade=undecided, undecided=LIMITS)
    down.ahead.begin(0, down.stream.draw)
    wait_until(lambda: all_are_graded(down))
    with pytest.raises(TooManyUndecided, match="step 000000"):
        rolled_out_of(down, 0)
    down.ahead.keep()
    saved = down.checkpoint(0)
    down.close()
    mended = start("continuous", 3, undecided=LIMITS)
    mended.resume(0, saved)
    for step in range(4):
        sampled = rolled_out_of(mended, step)
        assert all(graded.is_correct for group in sampled.groups for graded in group)
        mended.publish()


def test_too_many_undecided_ends_generation_at_once(fakes, start):
    trainer = start("one_ahead", 1, grade=undecided, undecided=LIMITS)
    trainer.ahead._num_steps = 1
    trainer.ahead.begin(0, trainer.stream.draw)
    wait_until(lambda: all_are_graded(trainer))
    trainer.ahead._num_steps = NUM_STEPS
    fakes.last(0).token_seconds = 60
    begin = time.monotonic()
    with pytest.raises(TooManyUndecided):
        rolled_out_of(trainer, 0)
    trainer.ahead.keep()
    assert time.monotonic() - begin < 5


def test_error_of_the_thread_that_grades_is_raised_by_the_next_call(start):
    def failing(requests):
        if len(seen) >= PROMPTS_PER_STEP:
            raise OSError("No space left on device")
        seen.append(requests)
        return grade(requests)

    seen = []
    trainer = start("one_ahead", 1, grade=failing)
    with pytest.raises(OSError, match="No space left"):
        trainer.step(0)  # does not wait for the grades of step 1
        trainer.ahead.take(1, trainer.stream.draw)


class Panic(BaseException):
    """What a tokenizer written in Rust raises; its two arguments make it impossible to unpickle."""

    def __init__(self, what, where):
        super().__init__(f"{what} at {where}")


class TwoArguments(ValueError):
    def __init__(self, what, where):
        super().__init__(f"{what} at {where}")


@pytest.mark.parametrize("kind", [Panic, TwoArguments])
def test_any_error_of_the_thread_that_grades_ends_the_wait(start, kind):
    def failing(requests):
        raise kind("no such token", "position 3")

    trainer = start("continuous", 1, grade=failing)
    with pytest.raises(RuntimeError, match=f"{kind.__name__}: no such token at position 3"):
        trainer.ahead.take(0, trainer.stream.draw)


def test_generation_that_is_cancelled_from_elsewhere_ends_the_wait(fakes, start):
    trainer = start("continuous", 1)
    fakes.last(0).token_seconds = 60
    trainer.ahead.begin(0, trainer.stream.draw)
    trainer.ahead._background._generation.future.cancel()
    with pytest.raises(RuntimeError, match="was cancelled"):
        trainer.ahead.take(0, trainer.stream.draw)


def test_end_after_an_error_loses_nothing_and_says_so(start, caplog):
    def failing(requests):
        raise OSError("No space left on device")

    trainer = start("continuous", 1, grade=failing)
    trainer.ahead.begin(0, trainer.stream.draw)
    wait_until(lambda: trainer.ahead._background.error is not None)
    trainer.ahead.keep()
    assert "No space left on device" in caplog.text


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
    def slow(requests):
        time.sleep(0.1)
        return grade(requests)

    trainer = start("continuous", 2, grade=slow)
    trainer.step(0)
    trainer.ahead.pause()
    assert not is_generating(trainer) and not any(batch.ungraded for batch in trainer.ahead._batches)
    requests = [request for batch in trainer.ahead._batches for request in batch.call.requests][:2]
    found = dict(trainer.engine.generate([requests], trainer.ahead._config.sampling))
    assert [completion.weight_spans[0].version for completion in found[0]] == [1, 1]
