"""`oreal-data pass-rates` on the model of a tiny run: a kill half-way, two processes, shards."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.run_processes import journalled, wait_until
from tests.tiny import FORKS, command_in_fork

pytestmark = pytest.mark.end_to_end

NUM_PROBLEMS, SAMPLES, BATCH = 40, 4, 4
SETTINGS = ("prompt=chat", "model.max_sequence_length=128", "prompt.max_prompt_tokens=64", "run.threads=1",
            "rollout.sampling.max_new_tokens=24", f"rollout.batch_size={BATCH}")  # fmt: skip


def start(log: Path, *arguments: str, environment: dict[str, str] | None = None) -> Any:
    process = FORKS.Process(target=_run, args=(("pass-rates", *arguments), str(log), environment or {}))
    process.start()
    return process


def _run(arguments: tuple[str, ...], log: str, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    command_in_fork(arguments, log, log, "data")


def end(process: Any, log: Path) -> str:
    process.join(300)
    assert process.exitcode == 0, log.read_text()
    return log.read_text()


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_killed_estimation_goes_on_with_the_same_pass_rates_as_two_processes_and_shards(finished, tmp_path):
    prompts, model = tmp_path / "sums.jsonl", str(finished / "huggingface" / "best" / "policy")
    pairs = [(a, b) for a in range(1, 10) for b in range(1, 10)][: NUM_PROBLEMS - 2]
    given = [{"question": f"Compute {a}+{b}.", "gold_answer": f"{a + b}", "topic": "sums"} for a, b in pairs]
    given[3]["pass_rate"] = 0.5  # of another model
    given.insert(1, {"question": f"Compute {'1+' * 60}1.", "gold_answer": "61"})  # beyond prompt.max_prompt_tokens
    prompts.write_text("".join(json.dumps(record) + "\n" for record in given))
    run, rated = tmp_path / "killed", tmp_path / "rated.jsonl"
    command = (model, str(prompts), f"--samples={SAMPLES}", "--output", str(rated), *SETTINGS, f"run.dir={run}")

    first = start(tmp_path / "first.log", *command)
    wait_until(lambda: len(journalled(run)) >= NUM_PROBLEMS // 3, seconds=240)
    first.kill()
    first.join()
    before = journalled(run)
    assert not rated.exists() and len(before) < len(given) - 1
    said = end(start(tmp_path / "second.log", *command), tmp_path / "second.log")
    after = journalled(run)
    assert set(before) <= set(after) and len(after) == len(set(after)) == len(given) - 1
    assert "without a pass rate: left out of data.train" in said and "0.2 to 0.4" in said

    found = records(rated)
    rates = [record.pop("pass_rate", None) for record in found]
    assert found == [{key: value for key, value in record.items() if key != "pass_rate"} for record in given]
    assert [index for index, rate in enumerate(rates) if rate is None] == [1]
    correct: dict[str, list[bool]] = {}
    for path in (run / "journal").glob("*.jsonl"):
        for unit in records(path):
            for rollout in unit["rollouts"]:
                own = correct.setdefault(rollout["prompt"]["question"], [])
                own.append(rollout["grade"]["verdict"] == "CORRECT")
    wanted = [sum(own) / SAMPLES if (own := correct.get(record["question"])) else None for record in found]
    assert rates == wanted
    assert len(set(rates)) > 3

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        job = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    shard = tmp_path / "shard.jsonl"
    command = (model, str(prompts), f"--samples={SAMPLES}", "--shard=2/3", "--output", str(shard), *SETTINGS,
               f"run.dir={tmp_path}/shard")  # fmt: skip
    ranks = [start(tmp_path / f"rank_{rank}.log", *command,
                   environment={**job, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)]  # fmt: skip
    for rank, process in enumerate(ranks):
        end(process, tmp_path / f"rank_{rank}.log")
    assert records(shard) == records(rated)[1::3]
