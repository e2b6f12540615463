"""Batch script of a run, and its submission to SLURM."""

from __future__ import annotations

import hashlib
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from oreal_megatron.config import ConfigError, TrainConfig, Violation
from oreal_megatron.overrides import config_directory
from oreal_megatron.slurm.cluster import ClusterConfig


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """Nodes of a job, by role: the trainer's first, then the servers' unless they share them, then the judges'."""

    trainer_nodes: int
    processes_per_node: int
    num_servers: int = 0
    server_nodes: int = 0
    servers_share: bool = False
    """Servers are on the trainer's nodes."""
    judge_nodes: int = 0

    @property
    def num_nodes(self) -> int:
        """Nodes of all roles together."""
        return self.trainer_nodes + (0 if self.servers_share else self.server_nodes) + self.judge_nodes


def allocation(
    config: TrainConfig,
    num_trainers: int,
    nodes: int | None = None,
    *,
    server_nodes: int | None = None,
    judge_nodes: int = 0,
) -> Allocation:
    """Returns the nodes of a job.

    nodes, server_nodes: number of nodes for trainer and servers; None: as few as hold them.

    Raises:
        ConfigError: the processes of a role do not spread evenly over its nodes.
    """
    per_node, servers = config.resources.devices_per_node, config.rollout.sglang
    violations = []
    trainer_nodes = nodes or ceil(num_trainers / per_node)
    if num_trainers % trainer_nodes or num_trainers // trainer_nodes > per_node:
        remedy = f"They do not spread evenly over {trainer_nodes} nodes of {per_node} devices. Set --nodes."
        violations.append(Violation("resources.trainer_devices", num_trainers, remedy))
    share, num_servers = False, 0
    # The job starts no servers where the run attaches to running ones.
    if servers is not None and not servers.urls:
        num_servers, share = servers.num_servers, servers.placement == "colocated"
        server_nodes = server_nodes or (trainer_nodes if share else ceil(num_servers * servers.tensor / per_node))
        server_nodes = min(server_nodes, num_servers)
        if ceil(num_servers / server_nodes) * servers.tensor > per_node:
            remedy = (
                f"{num_servers} servers of {servers.tensor} devices do not fit on {server_nodes} nodes of "
                f"{per_node} devices. Set --server-nodes."
            )
            violations.append(Violation("rollout.sglang.num_servers", num_servers, remedy))
    if violations:
        raise ConfigError(violations)
    return Allocation(
        trainer_nodes=trainer_nodes,
        processes_per_node=num_trainers // trainer_nodes,
        num_servers=num_servers,
        server_nodes=(server_nodes or 0) if num_servers else 0,
        servers_share=share,
        judge_nodes=judge_nodes,
    )


def nodes_of_another_kind(cluster: ClusterConfig, nodes: Allocation) -> int:
    """Returns the number of server nodes in a second component of the job; 0 where the job has one component."""
    differ = cluster.server_partition is not None or cluster.server_constraint is not None
    return nodes.server_nodes if differ and not nodes.servers_share else 0


def slurm_directory() -> Path:
    """Returns slurm/ of the checkout, or of the installed wheel where there is no checkout."""
    checkout = Path(__file__).resolve().parents[2] / "slurm"
    return checkout if checkout.is_dir() else Path(sys.prefix) / "share" / "oreal_megatron" / "slurm"


def rendered(
    config: TrainConfig,
    cluster: ClusterConfig,
    nodes: Allocation,
    overrides: Sequence[str],
    *,
    logs: Path,
    configuration: Path,
) -> str:
    """Returns the batch script: slurm/train.sbatch with this job's header and settings.

    logs: directory of the job's logs. configuration: the conf/ that the job composes.
    """
    text = (slurm_directory() / "train.sbatch").read_text()
    body = text[text.index("# === run ===\n") :].replace('arguments=("$@")', f"arguments=({shlex.join(overrides)})")
    header = "\n".join(f"#SBATCH {_batch_option(option)}" for option in _header(config, cluster, nodes, logs))
    settings = "\n".join(_settings(cluster, nodes, logs, configuration))
    return (
        f"#!/bin/bash\n# {config.run.name}: rendered by oreal-submit from slurm/train.sbatch\n# === header ===\n"
        f"{header}\n# === settings ===\n{settings}\n{body}"
    )


def configuration_of_job(logs: Path, config_dir: Path | None) -> tuple[Path, dict[str, bytes]]:
    """Returns the directory of a job's copy of conf/, below that of its logs, and the files to write there -> by name.

    The conf/ of a container's image may be another, and files may change while the job waits. The directory's name
    depends on the files, so that a job that is queued again finds its own, whatever was submitted since.

    config_dir: a directory with more options of groups, of which those that conf/ lacks are copied too.
    """
    files: dict[str, bytes] = {}
    for source in filter(None, (config_dir, config_directory())):
        files |= {str(file.relative_to(source)): file.read_bytes() for file in source.rglob("*.yaml")}
    digest = hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()
    return logs / f"conf-{digest[:12]}", files


def _batch_option(option: str) -> str:
    """Returns an option in the words of a script's header, in which a backslash escapes even between quotes."""
    name, equals, value = option.partition("=")
    # sbatch takes the words hetjob and packjob anywhere in a line for the start of a component.
    escaped = re.sub(r"(?i)[\"\\]|(?<=het)(?=job)|(?<=pack)(?=job)", r"\\\g<0>", value)
    return option if re.fullmatch(r"[\w./:@%+,-]*", escaped, re.ASCII) else f'{name}{equals}"{escaped}"'


def _header(config: TrainConfig, cluster: ClusterConfig, nodes: Allocation, logs: Path) -> Iterator[str]:
    apart = nodes_of_another_kind(cluster, nodes)
    yield f"--job-name={config.run.name}"
    yield f"--signal=B:USR1@{cluster.signal_seconds}"
    yield "--requeue"
    yield "--open-mode=append"
    yield f"--output={str(logs).replace('%', '%%')}/job-%j.log"
    yield from _component(config, cluster, nodes.num_nodes - apart)
    if apart:
        yield "hetjob"
        partition = cluster.server_partition or cluster.partition
        servers = cluster.model_copy(update={"partition": partition, "constraint": cluster.server_constraint})
        yield from _component(config, servers, apart)


def _component(config: TrainConfig, cluster: ClusterConfig, num_nodes: int) -> Iterator[str]:
    """Yields the options of a component with nodes of one kind."""
    yield f"--partition={cluster.partition}"
    for name in ("account", "qos", "constraint", "reservation"):
        if (value := getattr(cluster, name)) is not None:
            yield f"--{name}={value}"
    yield f"--nodes={num_nodes}"
    yield "--ntasks-per-node=1"
    yield f"--cpus-per-task={cluster.cpus_per_node}"
    yield f"--mem={cluster.memory_per_node}"
    if cluster.gpu_request == "gres":
        yield f"--gres=gpu:{config.resources.devices_per_node}"
    elif cluster.gpu_request == "gpus-per-node":
        yield f"--gpus-per-node={config.resources.devices_per_node}"
    yield f"--time={cluster.time_limit}"
    if cluster.exclude:
        yield f"--exclude={','.join(cluster.exclude)}"


def _settings(cluster: ClusterConfig, nodes: Allocation, logs: Path, configuration: Path) -> Iterator[str]:
    yield from cluster.setup
    yield from (f"module load {shlex.quote(module)}" for module in cluster.modules)
    python = Path(cluster.venv) / "bin" if cluster.venv else Path(sys.executable).parent
    if cluster.container is None:
        yield f"export PATH={shlex.quote(str(python))}:$PATH"
        yield "container=()"
    else:
        # Words between srun's options and a task's command: options for pyxis, or Apptainer's command.
        mounts = ",".join(cluster.mounts)
        words = [f"--container-image={cluster.container}", f"--container-mounts={mounts}"]
        if cluster.container.endswith(".sif"):
            words = ["apptainer", "exec", "--nv", f"--bind={mounts}", cluster.container]
        yield f"container=({shlex.join(words)})"
    if cluster.interface is not None:
        interface = shlex.quote(cluster.interface)
        yield f"export GLOO_SOCKET_IFNAME={interface} NCCL_SOCKET_IFNAME={interface}"
    yield from (f"export {name}={shlex.quote(value)}" for name, value in cluster.environment.items())
    yield f"export OREAL_CONF={shlex.quote(str(configuration))}"
    yield f"export OREAL_LOGS={shlex.quote(str(logs))}/logs-$SLURM_JOB_ID"
    yield f"export OREAL_TRAINER_NODES={nodes.trainer_nodes} OREAL_PROCESSES_PER_NODE={nodes.processes_per_node}"
    if nodes.num_servers:
        yield f"export OREAL_NUM_SERVERS={nodes.num_servers} OREAL_SERVER_NODES={nodes.server_nodes}"
        yield f"export OREAL_SERVERS_SHARE={int(nodes.servers_share)}"
    if nodes.judge_nodes:
        yield f"export OREAL_JUDGE_NODES={nodes.judge_nodes}"
        yield f"export OREAL_JUDGE_COMMAND={shlex.quote(str(cluster.judge_command))}"
    yield f"export OREAL_MAX_REQUEUES={cluster.max_requeues}"
    if cluster.node_check is not None:
        yield f"export OREAL_CHECK={shlex.quote(cluster.node_check)}"


def submitted(script: Path, *, after: str | None = None) -> str:
    """Submits the script and returns the new job's number.

    after: number of a job that must end first, with any status; None: start at once.

    Raises:
        ValueError: SLURM refuses the job.
    """
    command = ["sbatch", "--parsable"]
    if after is not None:
        command += [f"--dependency=afterany:{after}", "--kill-on-invalid-dep=yes"]
    return _sbatch([*command, str(script)]).split(";")[0]


def tested(text: str) -> str:
    """Returns when and where a batch script's job would start, in SLURM's words.

    Raises:
        ValueError: SLURM would refuse the job.
    """
    return _sbatch(["sbatch", "--test-only"], text)


def _sbatch(command: list[str], text: str | None = None) -> str:
    """Runs sbatch on a script that the command names, or on the text of one."""
    try:
        outcome = subprocess.run(command, input=text, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise ValueError("sbatch is not installed here. Submit on a login node of the cluster.") from error
    words = (outcome.stdout + outcome.stderr).strip()
    if outcome.returncode:
        message = re.sub(r"^(sbatch|allocation failure|error): *", "", words)
        raise ValueError(f"SLURM refuses the job: {message}")
    return words
