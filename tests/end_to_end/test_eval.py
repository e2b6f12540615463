"""`oreal-eval` on the model of a tiny run: the run's own scores, a kill half-way, two processes, other weights."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.run_processes import journalled, wait_until
from tests.tiny import FORKS, command_in_fork, metrics_of

pytestmark = pytest.mark.end_to_end

LENGTHS = ("prompt=chat", "model.max_sequence_length=128", "prompt.max_prompt_tokens=64", "run.threads=1",
           "evaluation.sampling.max_new_tokens=24", "rollout.sampling.max_new_tokens=24")  # fmt: skip
NUM_PROBLEMS, SAMPLES, BATCH = 60, 4, 4
UNITS = NUM_PROBLEMS * (1 + SAMPLES) // BATCH


class Evaluation:
    """A start of `oreal-eval` in a process of its own."""

    def __init__(self, log: Path, *arguments: str, environment: dict[str, str] | None = None):
        self.log = log
        self._process = FORKS.Process(target=_run, args=(arguments, str(log), environment or {}))
        self._process.start()

    def end(self) -> str:
        """Waits for its successful end; returns what it said."""
        self._process.join(300)
        assert self._process.exitcode == 0, self.log.read_text()
        return self.log.read_text()

    def kill(self) -> None:
        assert self._process.exitcode is None, self.log.read_text()
        self._process.kill()
        self._process.join()


def _run(arguments: tuple[str, ...], log: str, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    command_in_fork(arguments, log, log, "eval")


def results(directory: Path) -> dict[str, Any]:
    found = json.loads((directory / "evaluation.json").read_text())
    return {key: value for key, value in found.items() if key != "written"}


def responses(directory: Path) -> dict[str, list[dict[str, Any]]]:
    found = {}
    for path in sorted((directory / "responses").glob("*.jsonl")):
        found[path.name] = [json.loads(line) for line in path.read_text().splitlines()]
        for record in found[path.name]:
            del record["grade"]["seconds"]
    return found


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    path = tmp_path / "sums.jsonl"
    pairs = [(a, b) for a in range(1, 10) for b in range(1, 10)][:NUM_PROBLEMS]
    path.write_text("".join(f'{{"question": "Compute {a}+{b}.", "gold_answer": "{a + b}"}}\n' for a, b in pairs))
    return path


def test_the_scores_are_those_of_the_runs_own_evaluation(finished, tmp_path):
    settings = ("experiment=arithmetic", "evaluation=heldout", "run.threads=1", "model.geometry=null",
                "data.arithmetic.num_train=48", "data.arithmetic.num_heldout=16", "data.arithmetic.min_terms=2",
                "data.arithmetic.max_terms=3", "data.arithmetic.max_operand=9", "data.arithmetic.operators=['+']",
                "data.arithmetic.num_demonstrations=512", "rollout.sampling.max_new_tokens=24")  # fmt: skip
    directory = tmp_path / "evaluation"
    policy = str(finished / "huggingface" / "best" / "policy")
    said = Evaluation(tmp_path / "log", policy, *settings, f"run.dir={directory}").end()
    metrics = results(directory)["benchmarks"]["heldout"]["metrics"]
    # The best checkpoint is that of the first evaluation with the highest score.
    scores = [{k.partition("/")[2]: v for k, v in record["metrics"].items() if "reward_model" not in k}
              for record in metrics_of(finished) if record["kind"] == "evaluation"]  # fmt: skip
    best = max(scores, key=lambda one: one["greedy_pass@1"])
    assert {name: metrics[name] for name in best} == best
    assert metrics["pass@2"] >= metrics["avg@4"] and "maj@4" in best
    assert "heldout" in said and "greedy_pass@1" in said and "95% interval" in said
    # Only the policy was built, and nothing of it is saved.
    assert not (directory / "checkpoints").exists() and not (directory / "metrics.jsonl").exists()


def test_a_killed_evaluation_goes_on_with_the_same_responses_also_of_two_processes(finished, problems, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(finished / "huggingface" / "best" / "policy", model)
    settings = (str(model), "--benchmark", f"sums [1]={problems}", f"--samples={SAMPLES}", *LENGTHS,
                f"rollout.batch_size={BATCH}")  # fmt: skip
    killed, whole = tmp_path / "killed", tmp_path / "whole"

    first = Evaluation(tmp_path / "first.log", *settings, f"run.dir={killed}")
    wait_until(lambda: len(journalled(killed)) >= UNITS // 3)
    first.kill()
    before = journalled(killed)
    assert not (killed / "evaluation.json").exists() and len(before) < UNITS
    said = Evaluation(tmp_path / "second.log", *settings, f"run.dir={killed}").end()
    after = journalled(killed)
    assert after[: len(before)] == before and len(after) == len(set(after)) == UNITS
    assert f"{SAMPLES} samples of {NUM_PROBLEMS} problems {NUM_PROBLEMS * SAMPLES}/{NUM_PROBLEMS * SAMPLES}" in said

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        job = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    ranks = [
        Evaluation(tmp_path / f"rank_{rank}.log", *settings, f"run.dir={whole}",
                   environment={**job, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]  # fmt: skip
    for rank in ranks:
        rank.end()
    assert results(killed) == results(whole)
    assert responses(killed) == responses(whole)
    assert len(responses(whole)["sums [1].sampled.jsonl"]) == NUM_PROBLEMS * SAMPLES
    assert (whole / "evaluation.html").is_file()

    # Other weights at the same path: no response of the earlier ones is taken for theirs.
    weights = load_file(model / "model.safetensors")
    save_file({name: tensor * 1.5 for name, tensor in weights.items()}, model / "model.safetensors")
    Evaluation(tmp_path / "other.log", *settings, f"run.dir={killed}").end()
    assert results(killed)["weights"] != results(whole)["weights"]
    assert responses(killed) != responses(whole) and len(journalled(killed)) == 2 * UNITS
