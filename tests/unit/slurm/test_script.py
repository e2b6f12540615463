"""The batch script run by bash, with stand-ins for SLURM's commands that note their arguments."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from oreal_megatron.compose import composed, resolved
from oreal_megatron.config import TrainConfig, parse_config
from oreal_megatron.overrides import literal
from oreal_megatron.slurm.cluster import ClusterConfig, parse_cluster
from oreal_megatron.slurm.sbatch import Allocation, rendered

SCRIPT = Path(__file__).parents[3] / "slurm" / "train.sbatch"

# A server announces itself in the directory after --announce, and ends after the trainer's start; the
# trainer is what $TRAINER holds.
SRUN = """
for word in "$@"; do case $word in --job-name=*) name=${word#*=} ;; esac; done
printf '%s\\0' "$@" >"$CALLS/$name"
env -0 >"$CALLS/$name.environment"
case $name in
  servers) while [ "$1" != --announce ]; do shift; done; echo http://localhost:1 >"$2/server_0000.url"
    until [ -e "$CALLS/trainer.environment" ]; do sleep 0.02; done ;;
  check) while [ "$1" != bash ]; do shift; done; SLURMD_NODENAME=localhost "$@" ;;
  trainer) eval "${TRAINER:-}" ;;
esac
"""
STAND_INS = {
    "srun": SRUN,
    "scontrol": 'if [ "$2" = hostnames ]; then tr , "\\n" <<<"$3"; else echo JobState=CANCELLED; fi',
    "squeue": 'echo "7.1 trainer"',
    "scancel": 'echo "$*" >>"$CALLS/scancel"',
    "sleep": f'exec {shutil.which("sleep")} "$([ "$1" = 1 ] && echo 0.01 || echo "$1")"',
}


@pytest.fixture(scope="module")
def run_config() -> TrainConfig:
    return parse_config(resolved(composed(["experiment=arithmetic"])))


def site(**options: Any) -> ClusterConfig:
    raw: Any = OmegaConf.to_container(composed(["cluster=single_machine_test"])["cluster"], resolve=True)
    return parse_cluster(raw | options)


def calls_of(script: str, directory: Path, *, status: int = 0, **environment: str) -> dict[str, list[str]]:
    """Runs a batch script, which ends with this status; returns the words that the stand-ins noted -> by file."""
    bin, calls = directory / "bin", directory / "calls"
    for folder in (bin, calls):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    for name, text in STAND_INS.items():
        (bin / name).write_text(f"#!/bin/bash\n{text}\n")
        (bin / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "localhost", "CALLS": str(calls)}
    job |= {"SLURM_JOB_CPUS_PER_NODE": "8", "PATH": f"{bin}:{os.environ['PATH']}", **environment}
    path = directory / "script"
    path.write_text(script)
    outcome = subprocess.run(["bash", path], env={**os.environ, **job}, capture_output=True, text=True, timeout=60)
    assert (outcome.returncode, outcome.stderr) == (status, ""), outcome.stdout
    return {file.name: file.read_bytes().decode(errors="surrogateescape").split("\0")[:-1] for file in calls.iterdir()}


# Everything that a file name and a command line can hold, and SLURM takes.
NAMES = st.text(
    st.characters(exclude_categories=["C", "Z"], exclude_characters="/\\") | st.just(" "), min_size=1, max_size=12
)
ARGUMENTS = st.lists(
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12), max_size=4
)


EVERY_KIND = "a=b,c (d) 'e' \"f\" #g & {h} ~i ${j} $k `l` %t [m] hetjob é漢"


@settings(max_examples=8, deadline=None)
@example(name=EVERY_KIND, arguments=[EVERY_KIND, "", "a\nb", "\\"])
@given(name=NAMES.filter(lambda name: name.strip(".")), arguments=ARGUMENTS)
def test_names_and_arguments_arrive_as_they_are(run_config, name, arguments):
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary, name)
        run = run_config.run.model_copy(update={"name": name, "dir": str(directory)})
        config = run_config.model_copy(update={"run": run})
        overrides = [*arguments, f"run.dir={literal(str(directory))}"]
        nodes = Allocation(trainer_nodes=1, processes_per_node=1, num_servers=1, server_nodes=1, servers_share=True)
        cluster = site(container=f"/images/{name}", mounts=[f"/data/{name}"], node_check="test 'a b' = \"a b\" # fine")
        script = rendered(config, cluster, nodes, overrides, directory / "slurm" / "job.sbatch")
        calls = calls_of(script, Path(temporary))
        assert {"check", "servers", "trainer"} <= set(calls)
        assert "--time=10" in calls["check"]
        trainer = calls["trainer"]
        end = trainer.index("rank")
        assert trainer[end:-1] == ["rank", "oreal-train", *overrides]
        assert trainer[-1] == "rollout.sglang.urls=[http://localhost:1]"
        assert f"--container-image=/images/{name}" in trainer and f"--container-mounts=/data/{name}" in trainer
        logs = str(directory / "slurm" / "logs-7")
        assert f"--output={logs.replace('%', '%%')}/trainer_rank_%t.log" in trainer
        assert calls["servers"][-len(overrides) - 1 :] == [f"{logs}/servers.0", *overrides]
        assert composed([trainer[-2]])["run"]["dir"] == str(directory)


def test_apptainer_runs_the_commands_in_its_image(run_config, tmp_path):
    nodes = Allocation(trainer_nodes=1, processes_per_node=1, num_servers=1, server_nodes=1, servers_share=True)
    cluster = site(container="/my images/a.sif", mounts=["/data", "/runs:/runs:rw"])
    calls = calls_of(rendered(run_config, cluster, nodes, ["a=b"], tmp_path / "job.sbatch"), tmp_path)
    apptainer = ["apptainer", "exec", "--nv", "--bind=/data,/runs:/runs:rw", "/my images/a.sif"]
    for role, command in (("trainer", "bash"), ("servers", "python")):
        begin = calls[role].index("apptainer")
        assert calls[role][begin : begin + 6] == [*apptainer, command]


def test_steps_get_the_environment_where_the_site_exports_none(run_config, tmp_path):
    script = rendered(
        run_config, site(), Allocation(trainer_nodes=1, processes_per_node=1), [], tmp_path / "job.sbatch"
    )
    calls = calls_of(script, tmp_path, SLURM_EXPORT_ENV="NONE")
    assert "SLURM_EXPORT_ENV=ALL" in calls["trainer.environment"]


def test_each_role_gets_the_cpus_of_its_own_nodes(run_config, tmp_path):
    nodes = Allocation(trainer_nodes=2, processes_per_node=4, num_servers=1, server_nodes=1)
    hosts = {"SLURM_JOB_NODELIST": "localhost,localhost,localhost", "SLURM_JOB_NUM_NODES": "3"}
    script = rendered(run_config, site(), nodes, [], tmp_path / "job.sbatch")
    calls = calls_of(script, tmp_path, SLURM_JOB_CPUS_PER_NODE="96,64,10", **hosts)
    assert "--cpus-per-task=16" in calls["trainer"] and "--cpus-per-task=10" in calls["servers"]
    calls = calls_of(script, tmp_path, SLURM_JOB_CPUS_PER_NODE="12(x2),100", **hosts)
    assert "--cpus-per-task=3" in calls["trainer"] and "--cpus-per-task=100" in calls["servers"]


def script_of(run_config: TrainConfig, tmp_path: Path, **seconds: int) -> str:
    """A batch script for a trainer of one process, with other limits of time."""
    text = rendered(run_config, site(), Allocation(trainer_nodes=1, processes_per_node=1), [], tmp_path / "job.sbatch")
    for name, value in seconds.items():
        text, count = re.subn(rf"\n{name}=\d+\n", f"\n{name}={value}\n", text)
        assert count == 1
    return text


def test_ranks_that_outlive_a_failure_are_ended(run_config, tmp_path):
    trainer = 'echo "1.0 3 5 node9" >>"$OREAL_EXITS"; until [ -e "$CALLS/scancel" ]; do sleep 0.02; done; exit 143'
    calls = calls_of(script_of(run_config, tmp_path, grace_seconds=1), tmp_path, status=3, TRAINER=trainer)
    # The end of a rank that succeeded starts no such wait: srun --wait would end the main rank in its export.
    assert "--wait=0" in calls["trainer"]


def test_a_request_to_stop_is_repeated_until_the_trainer_ends(run_config, tmp_path):
    """The first request may come before the trainer handles signals."""
    trainer = """
        kill -USR1 $PPID; touch "$CALLS/scancel"
        until [ "$(grep --count -- '--signal=USR1 7.1' "$CALLS/scancel")" = 2 ]; do sleep 0.02; done
        exit 75"""
    calls_of(script_of(run_config, tmp_path, request_seconds=1), tmp_path, status=75, TRAINER=trainer)


# A trainer that saves at a signal: it is not live before it handles signals.
TRAINER = """
import os, signal, sys
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
os.write(1, b"live")
while True: signal.pause()
"""


def rank_function() -> str:
    text = SCRIPT.read_text()
    begin = text.index("rank() {")
    return text[begin : text.index("\n}\n", begin) + 3]


def start_rank(tmp_path: Path, *command: str) -> subprocess.Popen[bytes]:
    variables = {"SLURM_PROCID": "3", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8", "OREAL_EXITS": str(tmp_path / "exits")}
    return subprocess.Popen(
        ["bash", "-c", f'{rank_function()}rank "$@"', "rank", *command],
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        start_new_session=True,
    )


def test_a_rank_keeps_its_status_whenever_signals_come(tmp_path):
    rng = random.Random(0)
    for _ in range(200):
        # Bash starts quicker than Python. It cannot trap USR1, which rank has set to be ignored.
        rank = start_rank(tmp_path, "bash", "-c", 'trap "exit 75" TERM; echo live; while :; do sleep 0.01; done')
        assert rank.stdout is not None and rank.stdout.readline() == b"live\n"
        for _ in range(rng.randint(2, 6)):
            os.killpg(rank.pid, rng.choice([signal.SIGUSR1, signal.SIGTERM]))
            time.sleep(rng.uniform(0, 0.003))
        os.killpg(rank.pid, signal.SIGTERM)
        assert rank.wait(30) == 75
    assert [line.split()[1:3] for line in (tmp_path / "exits").read_text().splitlines()] == [["75", "3"]] * 200


def test_a_request_to_stop_before_the_trainer_handles_signals_does_not_end_it(tmp_path):
    slow = f"import time; print('starts', flush=True); time.sleep(0.5)\n{TRAINER}"
    rank = start_rank(tmp_path, sys.executable, "-c", slow)
    assert rank.stdout is not None and rank.stdout.readline() == b"starts\n"
    os.killpg(rank.pid, signal.SIGUSR1)
    assert rank.stdout.read(4) == b"live"
    os.killpg(rank.pid, signal.SIGUSR1)
    assert rank.wait(30) == 75
