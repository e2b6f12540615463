"""The batch script on a real SLURM, with shell scripts in the place of trainer and servers: roles, statuses, signals.

test_run.py and test_roles.py have the real ones.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from oreal_megatron.compose import composed, resolved
from oreal_megatron.config import parse_config
from oreal_megatron.files import write_atomically
from oreal_megatron.slurm.cluster import ClusterConfig, parse_cluster
from oreal_megatron.slurm.sbatch import Allocation, rendered, submitted

pytestmark = pytest.mark.slurm


@pytest.fixture
def site(tmp_path: Path):
    """A cluster whose oreal-train is `trainer`, and whose python announces a server and goes on as `servers`."""

    def make(trainer: str, servers: str = "exit 9", **options: Any) -> ClusterConfig:
        bin = tmp_path / "venv" / "bin"
        bin.mkdir(parents=True)
        announce = 'echo "http://$SLURMD_NODENAME:1" >"$4/server_$SLURM_NODEID.url"'
        for name, script in (("oreal-train", trainer), ("python", f"{announce}\n{servers}")):
            (bin / name).write_text(f"#!/bin/bash\n{script}\n")
            (bin / name).chmod(0o755)
        raw = composed(["cluster=single_machine_test", f"cluster.venv={tmp_path / 'venv'}"])["cluster"]
        raw = {**raw, "cpus_per_node": 2, "memory_per_node": "100", "gpu_request": "none", "environment": {}}
        raw |= {"shared": [], "exclude": [], "modules": [], "mounts": [], "setup": [], **options}
        return parse_cluster(raw)

    return make


@pytest.fixture
def submit(slurm, tmp_path: Path):
    config = parse_config(resolved(composed(["experiment=arithmetic", f"run.dir={tmp_path}"])))

    def run(
        cluster: ClusterConfig, *, trainers: int = 2, servers: int = 0, share: bool = False, after: str | None = None
    ) -> str:
        nodes = Allocation(
            trainer_nodes=trainers,
            processes_per_node=1,
            num_servers=servers,
            server_nodes=servers,
            servers_share=share,
            judge_nodes=cluster.judge_nodes,
        )
        script = tmp_path / "job.sbatch"
        paths = {"logs": tmp_path, "configuration": tmp_path / "conf"}
        write_atomically(script, rendered(config, cluster, nodes, ["a='b c'"], **paths))
        return submitted(script, after=after)

    return run


def log(tmp_path: Path, job: str) -> str:
    return (tmp_path / f"job-{job}.log").read_text()


def test_ranks_know_each_other_and_get_the_arguments(slurm, site, submit, tmp_path):
    job = submit(site('echo "$RANK of $WORLD_SIZE, local $LOCAL_RANK, $MASTER_ADDR $(( MASTER_PORT > 1024 )) $1"'))
    assert slurm.ended(job)["JobState"] == "COMPLETED"
    for rank in (0, 1):
        text = (tmp_path / f"logs-{job}" / f"trainer_rank_{rank}.log").read_text()
        assert text.strip() == f"{rank} of 2, local 0, node1 1 a='b c'"


def test_a_site_that_exports_nothing(slurm, site, submit, tmp_path, monkeypatch):
    monkeypatch.setenv("SBATCH_EXPORT", "NONE")
    job = submit(site('echo "$MASTER_ADDR"'), trainers=1)
    assert slurm.ended(job)["JobState"] == "COMPLETED"
    assert (tmp_path / f"logs-{job}" / "trainer_rank_0.log").read_text() == "node1\n"


def test_slurm_reads_names_as_they_are(slurm, site, tmp_path):
    config, cluster = parse_config(resolved(composed(["experiment=arithmetic"]))), site("true")
    for name in ("a  b=c,d", "'e' \"f\" #g & {h} ~i", "${j} $k `l` (m) [n] *?", "5%t é漢", "hetjob PackJob", " o "):
        directory = tmp_path / name
        named = config.model_copy(update={"run": config.run.model_copy(update={"name": name})})
        script = directory / "job.sbatch"
        nodes = Allocation(trainer_nodes=1, processes_per_node=1)
        text = rendered(named, cluster, nodes, [], logs=directory, configuration=directory / "conf")
        # Held: SLURM shows how it has read the header, and runs nothing.
        write_atomically(script, text.replace("# === settings ===", "#SBATCH --hold"))
        job = submitted(script)
        read = slurm("scontrol", "show", "job", job)
        slurm("scancel", job)
        assert f"JobName={name}\n" in read
        assert f"StdOut={str(directory).replace('%', '%%')}/job-{job}.log\n" in read


def test_the_status_is_that_of_what_failed_first(slurm, site, submit, tmp_path):
    # Rank 0 ends later and with a higher status, as a peer does that lost the other.
    job = submit(site("[ $RANK = 1 ] && { sleep 1; exit 3; }; sleep 4; exit 9"))
    assert slurm.ended(job)["ExitCode"] == "3:0"
    assert "rank 1 on node2 failed first" in log(tmp_path, job) and "status 3" in log(tmp_path, job)


def test_servers_end_with_the_trainer_and_not_the_other_way(slurm, site, submit, tmp_path):
    serve = 'echo "serving on $SLURMD_NODENAME"; trap "echo asked to end; exit 0" TERM; while :; do sleep 0.2; done'
    job = submit(site("echo $2; sleep 3; exit 5", serve), trainers=1, servers=2)
    assert slurm.ended(job)["ExitCode"] == "5:0"
    for index, node in enumerate(("node2", "node3")):
        text = (tmp_path / f"logs-{job}" / f"servers_node_{index}.log").read_text()
        assert f"serving on {node}" in text and "asked to end" in text
    trainer = (tmp_path / f"logs-{job}" / "trainer_rank_0.log").read_text()
    assert trainer.strip() == "rollout.sglang.urls=[http://node2:1,http://node3:1]"


def test_servers_and_judges_have_their_places(slurm, site, submit, tmp_path):
    """Servers on the trainer's nodes, where they share its devices; judges on a node of their own."""
    serve = 'trap "exit 0" TERM; while :; do sleep 0.2; done'
    judge = 'echo "judging at $JUDGE_PORT"; ' + serve
    job = submit(site('echo "$2 $3"', serve, judge_nodes=1, judge_command=judge), trainers=2, servers=2, share=True)
    assert slurm.ended(job)["JobState"] == "COMPLETED", log(tmp_path, job)
    logs = tmp_path / f"logs-{job}"
    port = (logs / "judges_node_0.log").read_text().split()[2]
    expected = f"rollout.sglang.urls=[http://node1:1,http://node2:1] verifier.judge.endpoints=[http://node3:{port}/v1]"
    assert (logs / "trainer_rank_0.log").read_text().strip() == expected
    assert "trainer on node1,node2, servers on node1,node2, judges on node3" in log(tmp_path, job)


def test_servers_on_another_kind_of_nodes(slurm, site, submit, tmp_path):
    """A heterogeneous job: queued again as a whole, with its servers ended and started anew."""
    serve = 'echo "serving on $SLURMD_NODENAME"; trap "echo asked to end; exit 0" TERM; while :; do sleep 0.2; done'
    trainer = 'echo "$2"; ' + TRAINER_THAT_SAVES.format(directory=tmp_path)
    cluster = site(trainer, serve, server_partition="urgent", node_check='test "$SLURMD_NODENAME" != node9')
    job = submit(cluster, trainers=2, servers=1)
    slurm.until(lambda: (tmp_path / f"logs-{job}" / "trainer_rank_0.log").exists())
    slurm("scancel", "--batch", "--signal=USR1", job)
    slurm.until(lambda: "ends with status" in log(tmp_path, job))
    assert "ends with status 0" in log(tmp_path, job)
    logs = tmp_path / f"logs-{job}"
    lives = (logs / "servers_node_0.log").read_text()
    assert (lives.count("serving on"), lives.count("asked to end")) == (2, 2)
    node = lives.rsplit("serving on ", 1)[1].split()[0]
    assert f"rollout.sglang.urls=[http://{node}:1]" in (logs / "trainer_rank_0.log").read_text()
    assert slurm.job(str(int(job) + 1))["Partition"] == "urgent"


def test_the_trainer_outlives_a_server(slurm, site, submit, tmp_path):
    job = submit(site("sleep 4; echo done", "sleep 1; exit 1"), trainers=1, servers=1)
    assert slurm.ended(job)["JobState"] == "COMPLETED"
    assert "done" in (tmp_path / f"logs-{job}" / "trainer_rank_0.log").read_text()


# In Python, because bash cannot trap a signal that was ignored when it started, as USR1 is for a trainer.
TRAINER_THAT_SAVES = f"""
[ -e {{directory}}/saved ] && {{{{ echo "goes on after $(<{{directory}}/saved)"; exit 0; }}}}
exec {sys.executable} -c '
import pathlib, signal, sys
def save(number, frame):
    pathlib.Path("{{directory}}/saved").write_text("signal")
    sys.exit(75)
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, save)
while True: signal.pause()'
"""


def test_a_signal_before_the_limit_saves_and_queues_again(slurm, site, submit, tmp_path):
    job = submit(site(TRAINER_THAT_SAVES.format(directory=tmp_path)))
    slurm.until(lambda: (tmp_path / f"logs-{job}" / "trainer_rank_0.log").exists())
    slurm("scancel", "--batch", "--signal=USR1", job)
    assert slurm.ended(job)["JobState"] == "COMPLETED"
    assert slurm.job(job)["Restarts"] == "1"
    assert "goes on after signal" in (tmp_path / f"logs-{job}" / "trainer_rank_0.log").read_text()
    assert "queued again" in log(tmp_path, job)


def test_a_preempted_job_saves_and_comes_back(slurm, site, submit, tmp_path):
    job = submit(site(TRAINER_THAT_SAVES.format(directory=tmp_path)))
    slurm.until(lambda: (tmp_path / f"logs-{job}" / "trainer_rank_0.log").exists())
    urgent = slurm(
        "sbatch", "--parsable", "--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"
    )
    assert slurm.ended(job)["JobState"] == "COMPLETED"
    assert slurm.job(urgent)["JobState"] == "COMPLETED"
    # SLURM sends the signal that the script asked for (preempt_send_user_signal), TERM only if that was sent before.
    assert "USR1: the trainer is asked to save" in log(tmp_path, job)
    assert "goes on after signal" in (tmp_path / f"logs-{job}" / "trainer_rank_0.log").read_text()


def test_scancel_ends_everything_and_does_not_queue_again(slurm, site, submit, tmp_path):
    mark = f"sleep 98{tmp_path.name.__hash__() % 10000:04d}"
    job = submit(site(mark, mark), trainers=1, servers=1)
    slurm.until(lambda: (tmp_path / f"logs-{job}" / "trainer_rank_0.log").exists())
    slurm("scancel", job)
    assert slurm.ended(job)["JobState"] == "CANCELLED"
    left = subprocess.run(["pgrep", "-f", f"^{mark}"], capture_output=True, text=True).stdout
    assert left == ""


def test_a_bad_node_is_left_out(slurm, site, submit, tmp_path):
    """Under the job's own number, so that the next job of a chain still waits for it."""
    job = submit(site("echo trained", node_check='test "$SLURMD_NODENAME" != node1', exclude=("node4",)))
    following = slurm("sbatch", "--parsable", f"--dependency=afterany:{job}", "--output=/dev/null", "--wrap=true")
    ended = slurm.ended(job)
    assert ended["JobState"] == "COMPLETED" and ended["Restarts"] == "1"
    assert sorted(ended["ExcNodeList"].split(",")) == ["node1", "node4"] or ended["ExcNodeList"] == "node[1,4]"
    assert "bad nodes: node1" in log(tmp_path, job)
    assert slurm.ended(following)["StartTime"] >= ended["EndTime"]


def test_a_chain_goes_on_after_a_job_that_failed(slurm, site, submit):
    cluster = site("exit 4")
    first = submit(cluster, trainers=1)
    second = submit(cluster, trainers=1, after=first)
    assert slurm.job(second)["JobState"] == "PENDING" or slurm.job(first)["JobState"] == "FAILED"
    assert slurm.ended(first)["ExitCode"] == "4:0"
    assert slurm.ended(second)["ExitCode"] == "4:0"


def test_slurm_words_of_a_refusal_come_through(slurm, site, submit):
    cluster = site("true").model_copy(update={"partition": "nowhere"})
    with pytest.raises(ValueError, match="invalid partition"):
        submit(cluster)
