"""Whole runs whose rollouts are generated ahead by one real SGLang server."""

from __future__ import annotations

import itertools
import os
import signal
from collections import Counter
from pathlib import Path

import pytest

from tests.run_processes import RunProcess, journalled, start_ranks, together
from tests.servers.conftest import require_sglang
from tests.servers.test_replicas import servers_of, trained_groups
from tests.tiny import metrics_of

pytestmark = [pytest.mark.servers, pytest.mark.distributed, pytest.mark.timeout(1200)]

NUM_STEPS, PROMPTS_PER_STEP, SAMPLES = 4, 8, 4
SCHEDULES = {"one_ahead": 1, "continuous": 2}


@pytest.fixture(autouse=True)
def _sglang():
    require_sglang()


def options(schedule: str, *more: str) -> tuple[str, ...]:
    return (
        "rollout=sglang_cpu",
        f"rollout.schedule={schedule}",
        "rollout.sglang.max_concurrency=8",
        "rollout.sglang.startup_seconds=900.0",
        "objective.importance_limit=2.0",
        "objective.actor_freeze_steps=0",
        "evaluation.benchmarks.heldout.samples=0",
        f"run.num_steps={NUM_STEPS}",
        *more,
    )


def assert_exact(directory: Path, schedule: str, *, is_uninterrupted: bool = True) -> None:
    """Every step has whole groups of its own prompts, each token with its weights and none older than the bound.

    is_uninterrupted: whether every response of one_ahead has the tokens of one policy.
    """
    steps, metrics = trained_groups(directory), [r for r in metrics_of(directory) if r["kind"] == "step"]
    assert [record["step"] for record in metrics] == list(range(NUM_STEPS)) and len(steps) == NUM_STEPS
    # 48 prompts: no prompt comes twice in the first epoch.
    assert set(Counter(id for groups in steps for id in groups).values()) == {1}
    version = 0
    for groups, record in zip(steps, metrics, strict=True):
        assert len(groups) == PROMPTS_PER_STEP
        assert all([r["sample_index"] for r in group] == list(range(SAMPLES)) for group in groups.values())
        for response in (response for group in groups.values() for response in group):
            spans = response["weight_spans"]
            assert spans[0]["start"] == 0 and spans[-1]["end"] == len(response["response_ids"])
            assert all(a["end"] == b["start"] and a["version"] < b["version"] for a, b in itertools.pairwise(spans))
            assert version - SCHEDULES[schedule] <= spans[0]["version"] and spans[-1]["version"] <= version
            if schedule == "one_ahead" and is_uninterrupted:
                assert len(spans) == 1
        assert record["metrics"]["rollout/oldest_updates"] <= SCHEDULES[schedule]
        assert 0 <= record["metrics"]["rollout/server_idle_share"] <= 1  # 1: all of it was in the journal
        version += record["skipped"] is None
    assert max(record["metrics"]["rollout/oldest_updates"] for record in metrics) > 0
    assert len(set(journalled(directory))) == len(journalled(directory))


def test_two_replicas_train_ahead_of_one_server(warm):
    directory = warm()
    together(directory, *options("continuous", "resources.trainer_devices=2"), num_processes=2)
    assert_exact(directory, "continuous")


def test_responses_of_two_replicas_keep_their_cache_over_publications(warm):
    directory = warm()
    # An evaluation ends generation; what it interrupted goes on under the weights that follow.
    overrides = options("continuous", "rollout.in_flight=keep_cache", "evaluation.every=0")
    together(directory, *overrides, "resources.trainer_devices=2", num_processes=2)
    assert_exact(directory, "continuous")
    responses = [r for groups in trained_groups(directory) for group in groups.values() for r in group]
    assert all(len(response["weight_spans"]) == 1 for response in responses)


def test_one_ahead_trains_and_evaluates_at_one_server(warm):
    directory = warm()
    run = RunProcess(directory, *options("one_ahead"))
    assert run.wait() == 0, run.said()
    assert_exact(directory, "one_ahead")
    assert [r["step"] for r in metrics_of(directory) if r["kind"] == "evaluation"] == [0, 2, 4]


def has_trained(directory: Path, num_steps: int):
    path = directory / "metrics.jsonl"
    return lambda: path.is_file() and sum(r["kind"] == "step" for r in metrics_of(directory)) >= num_steps


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_killed_trainer_goes_on_with_the_same_groups(warm, schedule):
    directory = warm()
    overrides = options(schedule, "run.checkpoint_every=1")
    run = RunProcess(directory, *overrides)
    assert run.wait_until(has_trained(directory, 2)), run.said()
    run.kill()
    before, units = trained_groups(directory), journalled(directory)
    run = RunProcess(directory, *overrides)
    assert run.wait() == 0, run.said()
    assert_exact(directory, schedule)
    assert trained_groups(directory)[: len(before)] == before
    kept = {unit.split()[0] for unit in journalled(directory)}
    assert {unit for unit in units if unit.split()[0] in kept} <= set(journalled(directory))


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_killed_server_costs_no_prompt(warm, schedule):
    directory = warm()
    run = RunProcess(directory, *options(schedule))
    assert run.wait_until(has_trained(directory, 1)), run.said()
    for pid in servers_of(directory):
        os.kill(pid, signal.SIGKILL)
    assert run.wait() == 0, run.said()
    assert_exact(directory, schedule)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_stopped_run_saves_and_goes_on(warm, schedule):
    directory = warm()
    ranks = start_ranks(directory, *options(schedule, "resources.trainer_devices=2"), num_processes=2)
    assert ranks[0].wait_until(has_trained(directory, 1)), ranks[0].said()
    ranks[1].signal(signal.SIGTERM)
    assert [rank.wait(60) for rank in ranks] == [75, 75], ranks[0].said()
    together(directory, *options(schedule, "resources.trainer_devices=2"), num_processes=2)
    assert_exact(directory, schedule, is_uninterrupted=False)
