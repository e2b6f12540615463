"""Evaluations while a run trains, on fake SGLang servers: which weights they have, and what ends, waits and is lost."""

from __future__ import annotations

import contextlib
import time
from types import SimpleNamespace

import pytest

from oreal_megatron import background_evaluation
from oreal_megatron.background_evaluation import begin_evaluation, end_evaluation, resume_evaluation
from oreal_megatron.compose import composed, validated
from oreal_megatron.config import ConfigError
from oreal_megatron.rollout.background_sampling import BackgroundSampling
from oreal_megatron.rollout.journal import RolloutJournal
from oreal_megatron.rollout.sampler import Sampler, rollout_seeds
from oreal_megatron.rollout.sglang_engine import SGLangEngine
from oreal_megatron.run_state import RunProgress
from oreal_megatron.servers.pool import ServerPool
from oreal_megatron.stopping import Stopped, StopRequest
from oreal_megatron.timeline import Timeline
from oreal_megatron.types import Benchmark, Prompt
from tests.fake_sglang import STOP, fake_servers
from tests.run_processes import wait_until
from tests.unit.rollout.test_journal import Renderer, grade
from tests.unit.rollout.test_sglang_engine import Publisher

BENCHMARK = Benchmark(
    name="sums", samples=2, prompts=[Prompt(id=str(i), question=f"{i}?", gold_answer=str(i)) for i in range(4)]
)
TRAINED = [Prompt(id=str(i), question=f"{i}?", gold_answer=str(i)) for i in range(10, 14)]
LENGTH = 20


class Store:
    """Checkpoints without content."""

    def __init__(self):
        self.is_busy = False
        self.names = {"initial"}
        self.loaded = []
        self.best = None

    def has(self, name):
        return name in self.names

    def damages(self, name):
        return []

    def load(self, name, wanted):
        self.loaded.append(name)

    def finish(self, *, wait):
        self.is_busy = False

    def remember_best(self, best):
        self.best = best


class Run:
    """A run without models at two servers, of which the second evaluates."""

    def __init__(self, directory, fakes, groups, urls, progress):
        sizes = [f"evaluation.sampling.max_new_tokens={LENGTH}", f"rollout.sampling.max_new_tokens={LENGTH}"]
        self.config = validated(composed(["experiment=arithmetic_sglang", *sizes]))
        self.groups, self.stop, self.num_steps = groups, StopRequest(), 9
        self.benchmarks, self.ahead, self.reward_model, self.sft = [BENCHMARK], None, None, None
        self.timeline, self.store, self.progress = Timeline(), Store(), progress
        self.verifier = SimpleNamespace(are_equal=lambda a, b: a == b)
        self.policy = SimpleNamespace(on_device=contextlib.nullcontext, module=None)
        self.reports = []
        self.tracker = SimpleNamespace(evaluation=self.reports.append, trajectories=lambda name, records: list(records))
        self.journals = [RolloutJournal(directory / "journal", groups) for _ in range(2)]
        self.engine, engine = self._engine(fakes, urls, range(1)), self._engine(fakes, urls, range(1, 2), 2)
        self.sampler = Sampler(
            self.engine, Renderer(), grade, self.journals[0], groups, self.stop, max_sequence_length=64, undecided=None
        )
        self.evaluation = BackgroundSampling(
            self.sampler.with_engine(engine, self.journals[1]), engine, groups, self.stop
        )

    def _engine(self, fakes, urls, members, num_generations=1):
        pool = ServerPool(
            fakes.settings(urls=urls, num_servers=2, max_concurrency=4),
            stop_token_id=STOP,
            config_json={},
            num_generations=num_generations,
            members=members,
        )
        engine = SGLangEngine(pool, Publisher(), self.groups, stop=self.stop, timeout_seconds=1.0)
        engine.publish(0)
        return engine

    def step(self):
        """Rollouts of a step, and an update."""
        self.sampler.sample(
            TRAINED,
            batch_name=f"step_{self.progress.step:06d}",
            num_samples=2,
            sampling=self.config.rollout.sampling,
            seed_of=rollout_seeds(0, "train", self.progress.step),
        )
        self.progress.step += 1
        self.progress.weight_version += 1
        self.engine.publish(self.progress.weight_version)
        self.store.names.add(f"step_{self.progress.step:06d}")

    def close(self):
        for part in (self.evaluation, self.engine, self.evaluation.engine, *self.journals):
            part.close()


@pytest.fixture
def fakes(tmp_path):
    with fake_servers(tmp_path) as opened:
        yield opened


@contextlib.contextmanager
def weights_of_checkpoint(prefix, module, load):
    """Reads a checkpoint, for a policy that has no weights."""
    load({})
    yield


@pytest.fixture
def start(fakes, tmp_path, single_process, monkeypatch):
    monkeypatch.setattr(background_evaluation, "weights_of_checkpoint", weights_of_checkpoint)
    runs = []

    def start_(*urls, progress=None):
        runs.append(Run(tmp_path, fakes, single_process, urls, progress or RunProgress()))
        return runs[-1]

    yield start_
    for run in runs:
        run.close()


def assert_report(run, step, version):
    """One report of a step, of responses that have the weights of one version."""
    (report,) = [report for report in run.reports if report.step == step]
    units = RolloutJournal(run.journals[0].directory, run.groups).read(f"evaluation_{step:06d}").values()
    assert {span.version for unit in units for one in unit for span in one.rollout.weight_spans} == {version}
    assert sum(len(unit) for unit in units) == len(BENCHMARK.prompts) * (1 + BENCHMARK.samples)
    assert report.metrics["sums/greedy_pass@1"] == 1.0
    assert run.progress.pending_evaluation is None
    return report


def test_steps_train_while_the_evaluation_keeps_its_weights_and_its_server(start, fakes):
    servers = [fakes.server(), fakes.server(token_seconds=0.02)]
    run = start(*(server.url for server in servers))
    begin_evaluation(run)
    label = servers[1].label
    for _ in range(3):
        run.step()
        end_evaluation(run, wait=False)
    assert not run.reports and servers[1].label == label != servers[0].label
    end_evaluation(run, wait=True)
    report = assert_report(run, 0, 0)
    assert report.ended_after == 3 and 0 < report.waited_seconds < report.seconds
    assert run.progress.best.step == run.store.best.step == 0
    questions = [{prompt[1] for prompt in server.prompts} for server in servers]
    assert questions == [{10, 11, 12, 13}, {0, 1, 2, 3}]  # neither server has the other's requests
    # Greedy responses and samples, which are asked for at the same time, share max_concurrency.
    assert servers[1].most_running == 4


def test_next_evaluation_waits_for_the_last_and_says_for_how_long(start, fakes, caplog):
    servers = [fakes.server(), fakes.server(token_seconds=0.08)]
    run = start(*(server.url for server in servers))
    begin_evaluation(run)
    run.step()
    end_evaluation(run, wait=True)
    begin_evaluation(run)
    assert "the evaluation after 0 steps was under way when the next was due, and training waited" in caplog.text
    assert assert_report_of_first(run).waited_seconds > 1.0
    servers[1].token_seconds = 0.001
    end_evaluation(run, wait=True)
    assert_report(run, 1, 1)
    assert [report.step for report in run.reports] == [0, 1]


def assert_report_of_first(run):
    (report,) = run.reports
    return report


def test_evaluation_is_not_named_best_before_a_checkpoint_that_is_written_is_whole(start, fakes):
    run = start(fakes.server().url, fakes.server().url)
    begin_evaluation(run)
    run.store.is_busy = True
    time.sleep(1.0)
    end_evaluation(run, wait=False)
    assert not run.reports
    run.store.is_busy = False
    wait_until(lambda: (end_evaluation(run, wait=False), run.reports)[1])


def test_lost_server_gets_the_weights_of_the_evaluation_again(start, fakes):
    run = start()
    run.step()
    begin_evaluation(run)
    server = fakes.last(1)
    server.token_seconds = 0.05
    run.step()
    wait_until(lambda: server.num_running)
    fakes.kill(server)
    end_evaluation(run, wait=True)
    assert_report(run, 1, 1)
    assert run.store.loaded == ["step_000001"] and fakes.last(1) is not server


def test_stopped_run_ends_the_evaluation_at_its_next_start(start, fakes, tmp_path):
    urls = [fakes.server().url, (server := fakes.server(token_seconds=0.02)).url]
    run = start(*urls)
    run.step()
    begin_evaluation(run)
    run.step()
    wait_until(lambda: list((tmp_path / "journal").glob("evaluation_000001.*")))
    run.stop.signal = "SIGTERM"
    with pytest.raises(Stopped, match="while the evaluation after 1 steps was under way"):
        end_evaluation(run, wait=True)
    run.close()
    num_asked, server.token_seconds = len(server.prompts), 0.001
    again = start(*urls, progress=run.progress)
    again.store.names = run.store.names
    resume_evaluation(again)
    end_evaluation(again, wait=True)
    assert_report(again, 1, 1)
    assert again.store.loaded == ["step_000001"]
    assert len(server.prompts) - num_asked < len(BENCHMARK.prompts) * (1 + BENCHMARK.samples)  # the journal has others
    # A start that finds all responses in the journal needs no weights.
    again.close()
    again.progress.pending_evaluation = background_evaluation.PendingEvaluation(step=1, weight_version=1)
    last = start(*urls, progress=again.progress)
    resume_evaluation(last)
    end_evaluation(last, wait=False)
    assert_report(last, 1, 1)
    assert not last.store.loaded


def test_evaluation_without_its_checkpoint_is_named_as_lost(start, fakes, caplog):
    progress = RunProgress(step=3, weight_version=3, evaluated_step=1)
    progress.pending_evaluation = background_evaluation.PendingEvaluation(step=1, weight_version=1)
    run = start(fakes.server().url, fakes.server().url, progress=progress)
    resume_evaluation(run)
    assert "the evaluation after 1 steps is lost" in caplog.text and "step_000001" in caplog.text
    assert run.progress.pending_evaluation is None and not run.reports


def test_run_that_goes_on_without_evaluation_servers_waits_for_the_evaluation(start, fakes):
    progress = RunProgress(step=3, weight_version=3, evaluated_step=1)
    progress.pending_evaluation = background_evaluation.PendingEvaluation(step=1, weight_version=1)
    run = start(fakes.server().url, fakes.server().url, progress=progress)
    run.store.names.add("step_000001")
    evaluation, run.evaluation = run.evaluation, None
    resume_evaluation(run)
    run.evaluation = evaluation
    assert_report(run, 1, 1)
    assert run.store.loaded == ["step_000001"] and run.engine.weight_version == 3


def test_journalled_evaluation_needs_neither_servers_of_its_own_nor_its_checkpoint(start, fakes):
    run = start(fakes.server().url, fakes.server().url)
    run.step()
    begin_evaluation(run)
    end_evaluation(run, wait=True)
    run.close()
    pending = background_evaluation.PendingEvaluation(step=1, weight_version=1)
    progress = RunProgress(step=3, weight_version=3, evaluated_step=1, pending_evaluation=pending)
    again = start(fakes.server().url, fakes.server().url, progress=progress)
    evaluation, again.evaluation = again.evaluation, None
    resume_evaluation(again)
    again.evaluation = evaluation
    assert_report(again, 1, 1)
    assert not again.store.loaded


@pytest.mark.parametrize(
    ("overrides", "remedy"),
    [
        (["experiment=arithmetic"], "cannot generate while it trains"),
        (["experiment=arithmetic_sglang"], "training needs at least one of them"),
        (["experiment=arithmetic_sglang", "rollout.sglang.num_servers=2", "evaluation=none", "evaluation.servers=1"],
         "There is no benchmark"),
        (["experiment=arithmetic_sglang", "rollout.sglang.placement=colocated", "rollout.sglang.num_servers=2"],
         "Colocated servers stand still"),
        (["experiment=arithmetic_sglang", "rollout.sglang.num_servers=2", "fp8=delayed", "fp8.policy.parameters=true"],
         "cannot get its FP8 weights back"),
    ],
)  # fmt: skip
def test_servers_of_evaluation_are_refused_where_they_cannot_be(overrides, remedy):
    with pytest.raises(ConfigError, match=remedy):
        validated(composed([*overrides, "evaluation.servers=1"]))
