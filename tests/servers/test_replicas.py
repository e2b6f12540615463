"""Whole runs of two data-parallel replicas that take turns with one real SGLang server, the long tail carried over."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.run_processes import journalled, wait_until
from tests.servers.conftest import require_sglang
from tests.servers.test_servers import is_running
from tests.tiny import TINY, metrics_of

pytestmark = [pytest.mark.servers, pytest.mark.distributed, pytest.mark.timeout(1200)]

# Twelve prompts are asked for where six are needed; each replica has eight of its requests at the server, which runs
# eight: when a step has enough, some are running, some wait at the server, and some have not been sent.
OPTIONS = (
    "rollout=sglang_cpu",
    "rollout.sampling.max_new_tokens=24",
    "rollout.sglang.max_concurrency=8",
    "rollout.sglang.startup_seconds=900.0",
    "rollout.sglang.placement=colocated",
    "rollout.sglang.transport=ipc",
    "resources.trainer_devices=2",
    "parallel.offload=true",
    "rollout.long_tail={oversample: 2.0, until: complete, carry_updates: 4}",
    "objective.importance_limit=2.0",
    "evaluation=none",
    "evaluation.every=0",
    "data.prompts_per_step=6",
    "run.num_steps=4",
    "run.checkpoint_every=2",
    "run.async_checkpoints=false",
)


@pytest.fixture(autouse=True)
def _sglang():
    require_sglang()


def start(directory: Path, log: Path) -> subprocess.Popen[bytes]:
    """The run, in a session of its own."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "oreal_megatron.cli.train"]
    with log.open("ab") as stream:
        return subprocess.Popen(
            [sys.executable, *torchrun, *TINY, *OPTIONS, f"run.dir={directory}"],
            stdout=stream,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )


def trained_groups(directory: Path) -> list[dict[str, list[dict]]]:
    """The rollouts of every step, by prompt id."""
    steps = []
    for path in sorted((directory / "trajectories").glob("step_*.jsonl")):
        groups: dict[str, list[dict]] = {}
        for line in path.read_text().splitlines():
            record = json.loads(line)
            groups.setdefault(record["prompt"]["id"], []).append(record)
        steps.append(groups)
    return steps


def assert_exact(directory: Path) -> None:
    """Every prompt once, in whole groups; every token stamped with the weights that generated it; nothing off."""
    steps, metrics = trained_groups(directory), metrics_of(directory)
    assert len(steps) == len(metrics) == 4
    ids = [id for groups in steps for id in groups]
    assert 4 * 6 <= len(set(ids)) == len(ids) <= 48  # of 48 prompts: none comes twice in the first epoch
    for groups, report in zip(steps, (record["metrics"] for record in metrics), strict=True):
        assert len(groups) >= 6 and report["rollout/asked_groups"] == 12
        assert report["rollout/unfinished_groups"] == 12 - len(groups)
        records = [record for group in groups.values() for record in group]
        assert all([r["sample_index"] for r in group] == [0, 1, 2, 3] for group in groups.values())
        for record in records:
            spans = record["weight_spans"]
            assert spans[0]["start"] == 0 and spans[-1]["end"] == len(record["response_ids"]) == len(record["logprobs"])
            for before, after in itertools.pairwise(spans):
                assert before["end"] == after["start"] and before["version"] < after["version"]
        if "policy/rollout_logprob_difference_max" in report:
            assert report["policy/rollout_logprob_difference_max"] < 1e-3
    carried = [record["metrics"]["rollout/carried_tokens"] for record in metrics]
    assert carried[0] == 0 and sum(carried) > 0
    versions = [len(record["weight_spans"]) for groups in steps for group in groups.values() for record in group]
    assert max(versions) > 1 and max(record["metrics"]["rollout/older_tokens"] for record in metrics) > 0
    # A step whose answers are all wrong, or all right, has nothing to train and no report of an update.
    trained = [record["metrics"] for record in metrics if not record["metrics"].get("policy/frozen", 1.0)]
    assert trained and all("policy/importance_truncated" in report for report in trained)


def test_two_replicas_at_one_server_train_every_prompt_once(warm, tmp_path):
    directory, log = warm(), tmp_path / "log"
    assert start(directory, log).wait(1000) == 0, log.read_text()
    assert_exact(directory)
    assert len(set(journalled(directory))) == len(journalled(directory))


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_same_groups_and_its_server_is_gone(warm, tmp_path):
    directory, log = warm(), tmp_path / "log"
    job = start(directory, log)
    third = directory / "journal" / "step_000003.replica_0.jsonl"
    wait_until(lambda: job.poll() is not None or (third.is_file() and third.read_text()), seconds=1000)
    assert job.poll() is None, log.read_text()
    servers = servers_of(directory)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    wait_until(lambda: not any(is_running(pid) for pid in servers))
    before, units = trained_groups(directory), journalled(directory)
    assert len(before) >= 3
    assert start(directory, log).wait(1000) == 0, log.read_text()
    assert_exact(directory)
    # From the checkpoint after two steps the third has the very rollouts that it had, spans and all.
    assert trained_groups(directory)[: len(before)] == before
    assert set(units) <= set(journalled(directory)) and len(set(journalled(directory))) == len(journalled(directory))


def servers_of(directory: Path) -> list[int]:
    """Processes whose command serves a model of this run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if re.search(r"sglang\.launch_server", command) and str(directory) in command:
            found.append(int(path.parent.name))
    assert found
    return found
