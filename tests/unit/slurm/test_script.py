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
  servers) [ -z "${SERVERS:-}" ] || { eval "$SERVERS"; exit; }
    while [ "$1" != --announce ]; do shift; done; echo http://localhost:1 >"$2/server_0000.url"
    until [ -e "$CALLS/trainer.environment" ]; do sleep 0.02; done ;;
  check) while [ "$1" != bash ]; do shift; done
    for node in ${HEALTHY-localhost}; do SLURMD_NODENAME=$node "$@"; done ;;
  trainer) eval "${TRAINER:-}" ;;
esac
"""
STAND_INS = {
    "srun": SRUN,
    "scontrol": """
case "$1 $2" in
  *hostnames) tr , "\\n" <<<"$3" ;;
  requeue*|update*) echo "$*" >>"$CALLS/scontrol" ;;
  *) echo "x JobState=${STATE:-CANCELLED} ExcNodeList=$EXCLUDED" ;;
esac
""",
    "squeue": 'echo "7.1 trainer"',
    "scancel": 'echo "$*" >>"$CALLS/scancel"',
    "sleep": f'exec {shutil.which("sleep")} "$(case $1 in 1|60) echo 0.01 ;; *) echo "$1" ;; esac)"',
}


@pytest.fixture(scope="module")
def run_config() -> TrainConfig:
    return parse_config(resolved(composed(["experiment=arithmetic"])))


def site(**options: Any) -> ClusterConfig:
    raw: Any = OmegaConf.to_container(composed(["cluster=single_machine_test"])["cluster"], resolve=True)
    return parse_cluster(raw | options)


def paths(directory: Path) -> dict[str, Path]:
    return {"logs": directory, "configuration": directory / "conf"}


def calls_of(script: str, directory: Path, *, status: int = 0, **environment: str) -> dict[str, list[str]]:
    """Runs a batch script, which ends with this status; returns what the stand-ins noted -> by file, and `said`."""
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
    words = {file.name: file.read_bytes().decode(errors="surrogateescape") for file in calls.iterdir()}
    return {"said": [outcome.stdout]} | {
        name: text.split("\0")[:-1] if "\0" in text else text.splitlines() for name, text in words.items()
    }


# Everything that a file name and a command line can hold, and SLURM takes.
NAMES = st.text(
    st.characters(exclude_categories=["C", "Z"], exclude_characters="/\\") | st.just(" "), min_size=1, max_size=12
)
ARGUMENTS = st.lists(
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12), max_size=4
)


EVERY_KIND = "a=b,c (d) 'e' \"f\" #g & {h} ~i ${j} $k `l` %t [m] hetjob é漢"


@settings(max_examples=8)
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
        script = rendered(config, cluster, nodes, overrides, **paths(directory / "slurm"))
        calls = calls_of(script, Path(temporary))
        assert {"check", "servers", "trainer"} <= set(calls)
        assert "--time=10" in calls["check"]
        trainer = calls["trainer"]
        end = trainer.index("rank")
        assert trainer[end:-1] == ["rank", f"{directory}/slurm/logs-7/exits.0/trainer", "oreal-train", *overrides]
        assert trainer[-1] == "rollout.sglang.urls=[http://localhost:1]"
        assert f"--container-image=/images/{name}" in trainer and f"--container-mounts=/data/{name}" in trainer
        logs = str(directory / "slurm" / "logs-7")
        assert f"--output={logs.replace('%', '%%')}/trainer_rank_%t.log" in trainer
        assert calls["servers"][-len(overrides) - 1 :] == [f"{logs}/servers.0", *overrides]
        assert composed([trainer[-2]])["run"]["dir"] == str(directory)


def test_apptainer_runs_the_commands_in_its_image(run_config, tmp_path):
    nodes = Allocation(trainer_nodes=1, processes_per_node=1, num_servers=1, server_nodes=1, servers_share=True)
    cluster = site(container="/my images/a.sif", mounts=["/data", "/runs:/runs:rw"])
    calls = calls_of(rendered(run_config, cluster, nodes, ["a=b"], **paths(tmp_path)), tmp_path)
    apptainer = ["apptainer", "exec", "--nv", "--bind=/data,/runs:/runs:rw", "/my images/a.sif"]
    for role in ("trainer", "servers"):
        begin = calls[role].index("apptainer")
        assert calls[role][begin : begin + 6] == [*apptainer, "bash"]


def test_steps_get_the_environment_where_the_site_exports_none(run_config, tmp_path):
    script = rendered(run_config, site(), Allocation(trainer_nodes=1, processes_per_node=1), [], **paths(tmp_path))
    calls = calls_of(script, tmp_path, SLURM_EXPORT_ENV="NONE")
    assert "SLURM_EXPORT_ENV=ALL" in calls["trainer.environment"]


def test_each_role_gets_the_cpus_of_its_own_nodes(run_config, tmp_path):
    nodes = Allocation(trainer_nodes=2, processes_per_node=4, num_servers=1, server_nodes=1)
    hosts = {"SLURM_JOB_NODELIST": "localhost,localhost,localhost", "SLURM_JOB_NUM_NODES": "3"}
    script = rendered(run_config, site(), nodes, [], **paths(tmp_path))
    calls = calls_of(script, tmp_path, SLURM_JOB_CPUS_PER_NODE="96,64,10", **hosts)
    assert "OREAL_TRAINERS=localhost,localhost" in calls["servers.environment"]
    assert "--cpus-per-task=16" in calls["trainer"] and "--cpus-per-task=10" in calls["servers"]
    calls = calls_of(script, tmp_path, SLURM_JOB_CPUS_PER_NODE="12(x2),100", **hosts)
    assert "--cpus-per-task=3" in calls["trainer"] and "--cpus-per-task=100" in calls["servers"]


def script_of(run_config: TrainConfig, tmp_path: Path, **seconds: int) -> str:
    """A batch script for a trainer of one process, with other limits of time."""
    text = rendered(run_config, site(), Allocation(trainer_nodes=1, processes_per_node=1), [], **paths(tmp_path))
    for name, value in seconds.items():
        text, count = re.subn(rf"\n{name}=\d+\n", f"\n{name}={value}\n", text)
        assert count == 1
    return text


FAILED = 'echo "$1 $2 $3 node9" >"$OREAL_LOGS/exits.0/trainer/$3"'


def test_ranks_that_outlive_a_failure_are_ended(run_config, tmp_path):
    wait = 'until [ -e "$CALLS/scancel" ]; do sleep 0.02; done; exit 143'
    trainer = f"set 1.0 3 5; {FAILED}; {wait}"
    calls = calls_of(script_of(run_config, tmp_path, grace_seconds=1), tmp_path, status=3, TRAINER=trainer)
    # The end of a rank that succeeded starts no such wait: srun --wait would end the main rank in its export.
    assert "--wait=0" in calls["trainer"]


def test_the_first_failure_is_found_among_stops_and_torn_files(run_config, tmp_path):
    failures = [("1764407342.25", 9, 1), ("1764407342.125", 4, 2), ("1764407340.5", 75, 3)]
    notes = "; ".join(f"set {when} {status} {rank}; {FAILED}" for when, status, rank in failures)
    torn = 'echo "1764407341.0 5" >"$OREAL_LOGS/exits.0/trainer/4"; : >"$OREAL_LOGS/exits.0/trainer/5"'
    calls_of(script_of(run_config, tmp_path), tmp_path, status=4, TRAINER=f"{torn}; {notes}; exit 9")


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (143, True)])
def test_a_run_that_is_complete_when_a_stop_is_asked_for_is_not_queued_again(run_config, tmp_path, status, requeued):
    trainer = f"kill -USR1 $PPID; exit {status}"
    calls = calls_of(script_of(run_config, tmp_path), tmp_path, status=status, TRAINER=trainer, STATE="RUNNING")
    assert ("scontrol" in calls) == requeued


UNTIL_THE_JOB_ENDS = "exec >&- 2>&-; while kill -0 $PPID 2>/dev/null; do sleep 0.02; done"


def test_servers_that_fail_on_one_node_end_the_job(run_config, tmp_path):
    """The other node's servers would wait for a trainer that waits for all servers."""
    nodes = Allocation(trainer_nodes=1, processes_per_node=1, num_servers=2, server_nodes=2)
    hosts = {"SLURM_JOB_NODELIST": "localhost,localhost,localhost", "SLURM_JOB_NUM_NODES": "3"}
    script = rendered(run_config, site(), nodes, [], **paths(tmp_path))
    # The step of both nodes goes on after one has failed.
    servers = """
        while [ "$1" != bash ]; do shift; done
        command=("${@:1:6}"); SLURM_PROCID=1 SLURMD_NODENAME=node9 "${command[@]}" bash -c "exit 3"
        """
    calls = calls_of(script, tmp_path, status=1, SERVERS=servers + UNTIL_THE_JOB_ENDS, **hosts)
    assert "trainer" not in calls
    said = calls["said"][0]
    assert f"servers on node9 ended with status 3 before they began: {tmp_path}/logs-7/servers_node_1.log" in said


def test_servers_that_never_say_where_they_are_end_the_job(run_config, tmp_path):
    nodes = Allocation(trainer_nodes=1, processes_per_node=1, num_servers=1, server_nodes=1, servers_share=True)
    text = rendered(run_config, site(), nodes, [], **paths(tmp_path)).replace(
        "announce_seconds=1800", "announce_seconds=1"
    )
    calls = calls_of(text, tmp_path, status=1, SERVERS=UNTIL_THE_JOB_ENDS)
    assert "0 of 1 servers have an address after 1 s" in calls["said"][0]


def test_a_bad_node_is_left_out_under_the_same_number(run_config, tmp_path):
    """The next job of a chain waits for that number."""
    nodes = Allocation(trainer_nodes=3, processes_per_node=1)
    script = rendered(run_config, site(node_check="true", max_requeues=3), nodes, [], **paths(tmp_path))
    three = {"SLURM_JOB_NODELIST": "localhost,bad,worse", "SLURM_JOB_NUM_NODES": "3", "EXCLUDED": "old"}
    three |= {"STATE": "RUNNING", "SLURM_JOB_CPUS_PER_NODE": "8(x3)"}
    calls = calls_of(script, tmp_path, status=1, **three)
    assert calls["scontrol"] == ["requeue 7", "update JobId=7 ExcNodeList=bad,worse,old"]
    assert "trainer" not in calls
    # Where no node passes, the check is at fault, and a job does not go round for ever.
    assert "scontrol" not in calls_of(script, tmp_path, status=1, **three, HEALTHY="", SLURM_RESTART_COUNT="1")
    assert "scontrol" not in calls_of(script, tmp_path, status=1, **three | {"STATE": "CANCELLED"})
    assert "scontrol" not in calls_of(script, tmp_path, status=1, **three, SLURM_RESTART_COUNT="3")


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


def task_functions() -> str:
    text = SCRIPT.read_text()
    begin = text.index("recorded() {")
    return text[begin : text.index("\ntask=", begin) + 1]


def start_rank(tmp_path: Path, *command: str) -> subprocess.Popen[bytes]:
    """Starts a process of the trainer, as one of 8."""
    variables = {"SLURM_PROCID": "3", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"}
    return subprocess.Popen(
        ["bash", "-c", f'{task_functions()}"$@"', "task", "rank", tmp_path, *command],
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
        assert (tmp_path / "3").read_text().split()[1:3] == ["75", "3"]
        (tmp_path / "3").unlink()


def test_a_request_to_stop_before_the_trainer_handles_signals_does_not_end_it(tmp_path):
    slow = f"import time; print('starts', flush=True); time.sleep(0.5)\n{TRAINER}"
    rank = start_rank(tmp_path, sys.executable, "-c", slow)
    assert rank.stdout is not None and rank.stdout.readline() == b"starts\n"
    os.killpg(rank.pid, signal.SIGUSR1)
    assert rank.stdout.read(4) == b"live"
    os.killpg(rank.pid, signal.SIGUSR1)
    assert rank.wait(30) == 75


def test_usr1_to_all_steps_ends_no_server(tmp_path):
    command = ["task", "recorded", tmp_path, "bash", "-c", "kill -USR1 $$; echo lives"]
    outcome = subprocess.run(["bash", "-c", f'{task_functions()}"$@"', *command], capture_output=True, text=True)
    assert (outcome.returncode, outcome.stdout, list(tmp_path.iterdir())) == (0, "lives\n", [])


@pytest.mark.parametrize("file", [SCRIPT, SCRIPT.parents[1] / "docs" / "slurm.md"], ids=lambda file: file.name)
def test_the_command_by_hand_starts_what_its_experiment_asks_for(file):
    text = re.sub(r"\\\n#? *", "", file.read_text())
    (words,) = [line.strip("# ").split() for line in text.splitlines() if "slurm/train.sbatch experiment=" in line]
    options, arguments = words[1 : words.index("slurm/train.sbatch")], words[words.index("slurm/train.sbatch") + 1 :]
    config = parse_config(resolved(composed(arguments)))
    assert {"--nodes=2", "--gpus-per-node=8", "--cpus-per-task=96"} <= set(options)
    assert (config.resources.trainer_devices, config.rollout.sglang) == (2 * 8, None)
