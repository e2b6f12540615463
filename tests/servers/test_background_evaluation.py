"""A whole run with two real SGLang servers, one of which evaluates while the run trains at the other."""

from __future__ import annotations

import json
import os
import signal

import pytest

from tests.run_processes import RunProcess, together
from tests.servers.conftest import require_sglang
from tests.servers.test_ahead import has_trained
from tests.servers.test_replicas import servers_of
from tests.tiny import FORKS, TINY, command_in_fork, metrics_of

pytestmark = [pytest.mark.servers, pytest.mark.distributed, pytest.mark.timeout(1200)]

OPTIONS = (
    "rollout=sglang_cpu",
    "rollout.sglang.num_servers=2",
    "rollout.sglang.max_concurrency=8",
    "rollout.sglang.startup_seconds=900.0",
    "evaluation.servers=1",
    "evaluation.every=4",
    "evaluation.benchmarks.heldout.samples=16",
    "objective.actor_freeze_steps=0",
    "run.num_steps=6",
    "run.checkpoint_every=0",
    "run.keep_checkpoints=9",
    "run.export=every",
)


@pytest.fixture(autouse=True)
def _sglang():
    require_sglang()


def rows(directory):
    return [(record["kind"], record["step"]) for record in metrics_of(directory)]


def evaluations_of(directory):
    return {record["step"]: record for record in metrics_of(directory) if record["kind"] == "evaluation"}


def test_steps_train_while_the_weights_of_a_step_are_evaluated(warm, tmp_path):
    directory = warm()
    run = RunProcess(directory, *OPTIONS)
    assert run.wait() == 0, run.said()
    evaluations = evaluations_of(directory)
    assert list(evaluations) == [0, 4, 6]
    # Its record comes behind those of steps that were trained meanwhile.
    assert evaluations[0]["ended_after"] > 0
    assert rows(directory).index(("evaluation", 0)) > rows(directory).index(("step", 0))
    with (directory / "evaluations" / "heldout_000004.jsonl").open() as lines:
        versions = {span["version"] for line in lines for span in json.loads(line)["weight_spans"]}
    assert versions == {4}  # no publication of a later step has reached the server
    best = json.loads((directory / "checkpoints" / "best.json").read_text())
    scores = {step: record["metrics"]["heldout/greedy_pass@1"] for step, record in evaluations.items()}
    assert best["score"] == max(scores.values()) == scores[best["step"]]
    assert (directory / "checkpoints" / "step_000004").is_dir()  # none is due there but for the evaluation
    assert greedy_score(directory, tmp_path, 4) == scores[4]


def greedy_score(directory, tmp_path, step):
    """The greedy score of the embedded engine, for which nothing else is done meanwhile."""
    problems = tmp_path / "problems.jsonl"
    found = {}
    for line in (directory / "evaluations" / f"heldout_{step:06d}.jsonl").read_text().splitlines():
        prompt = json.loads(line)["prompt"]
        found[prompt["question"]] = prompt["gold_answer"]
    problems.write_text("".join(json.dumps({"question": q, "gold_answer": a}) + "\n" for q, a in found.items()))
    policy = str(directory / "huggingface" / f"step_{step:06d}" / "policy")
    lengths = [each for each in TINY if each.startswith(("rollout.sampling.max_new_tokens", "run.threads"))]
    arguments = (policy, "--benchmark", f"heldout={problems}", *lengths, "prompt=chat", "prompt.max_prompt_tokens=64",
                 "model.max_sequence_length=128", "rollout=embedded", f"run.dir={tmp_path / 'alone'}")  # fmt: skip
    log = str(tmp_path / "alone.log")
    process = FORKS.Process(target=command_in_fork, args=(arguments, log, log, "eval"))
    process.start()
    process.join(500)
    assert process.exitcode == 0, (tmp_path / "alone.log").read_text()
    results = json.loads((tmp_path / "alone" / "evaluation.json").read_text())
    return results["benchmarks"]["heldout"]["metrics"]["greedy_pass@1"]


@pytest.mark.slow
def test_two_replicas_evaluate_at_one_server(warm):
    directory = warm()
    together(directory, *OPTIONS, "resources.trainer_devices=2", num_processes=2)
    evaluations = evaluations_of(directory)
    assert list(evaluations) == [0, 4, 6] and evaluations[0]["ended_after"] > 0
    lines = (directory / "evaluations" / "heldout_000004.jsonl").read_text().splitlines()
    assert len(lines) == 16 * 16 and {
        span["version"] for line in lines for span in json.loads(line)["weight_spans"]
    } == {4}


@pytest.mark.slow
def test_killed_run_ends_the_evaluation_with_the_weights_of_its_step(warm):
    directory = warm()
    options = (*OPTIONS, "run.checkpoint_every=1", "evaluation.benchmarks.heldout.samples=64")
    run = RunProcess(directory, *options)
    assert run.wait_until(has_trained(directory, 6)), run.said()
    run.kill()
    run = RunProcess(directory, *options)
    assert run.wait() == 0, run.said()
    assert "the evaluation after 4 steps was under way, and goes on" in run.said()
    assert [step for kind, step in rows(directory) if kind == "evaluation"] == [0, 4, 6]
    with (directory / "evaluations" / "heldout_000004.jsonl").open() as lines:
        assert {span["version"] for line in lines for span in json.loads(line)["weight_spans"]} == {4}


@pytest.mark.slow
def test_lost_server_gets_the_weights_of_the_evaluation_again(warm):
    directory = warm()
    run = RunProcess(directory, *OPTIONS, "evaluation.benchmarks.heldout.samples=64")
    assert run.wait_until(has_trained(directory, 5)), run.said()
    for pid in servers_of(directory):
        os.kill(pid, signal.SIGKILL)
    assert run.wait() == 0, run.said()
    assert list(evaluations_of(directory)) == [0, 4, 6]
    with (directory / "evaluations" / "heldout_000004.jsonl").open() as lines:
        assert {span["version"] for line in lines for span in json.loads(line)["weight_spans"]} == {4}
