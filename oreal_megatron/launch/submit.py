"""A run as a SLURM job: the script, and its submission."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from oreal_megatron.config import TrainConfig
from oreal_megatron.launch.cluster import ClusterConfig


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """Nodes of a job."""

    trainer_nodes: int
    server_nodes: int
    processes_per_node: int

    @property
    def num_nodes(self) -> int:
        return self.trainer_nodes + self.server_nodes


def allocation(config: TrainConfig, num_trainers: int, nodes: int | None = None) -> Allocation:
    """nodes: spread the trainer over so many; None: as few as hold it.

    Raises:
        ValueError: the trainer's processes do not spread evenly.
    """
    per_node, servers = config.resources.devices_per_node, config.rollout.sglang
    trainer_nodes = nodes or ceil(num_trainers / per_node)
    if num_trainers % trainer_nodes or num_trainers // trainer_nodes > per_node:
        raise ValueError(
            f"resources.trainer_devices: {num_trainers} processes do not spread evenly over {trainer_nodes} nodes of "
            f"{per_node} devices"
        )
    apart = servers is not None and servers.placement == "disaggregated"
    return Allocation(
        trainer_nodes=trainer_nodes,
        server_nodes=ceil(servers.num_servers * servers.tensor / per_node) if apart and servers else 0,
        processes_per_node=num_trainers // trainer_nodes,
    )


def slurm_directory() -> Path:
    """slurm/ beside the package in a checkout, or where an installed wheel puts it."""
    checkout = Path(__file__).resolve().parents[2] / "slurm"
    return checkout if checkout.is_dir() else Path(sys.prefix) / "share" / "oreal_megatron" / "slurm"


def rendered(
    config: TrainConfig, cluster: ClusterConfig, nodes: Allocation, overrides: Sequence[str], script: Path
) -> str:
    """The batch script: slurm/train.sbatch with this job's header and settings. script: where it will lie."""
    text = (slurm_directory() / "train.sbatch").read_text()
    body = text[text.index("# === run ===\n") :].replace('"$@"', " ".join(map(shlex.quote, overrides)))
    header = "\n".join(f"#SBATCH {option}" for option in _header(config, cluster, nodes, script.parent))
    settings = "\n".join(_settings(cluster, nodes, script))
    return (
        f"#!/bin/bash\n# {config.run.name}: rendered by oreal-submit from slurm/train.sbatch\n# === header ===\n"
        f"{header}\n# === settings ===\n{settings}\n{body}"
    )


def _header(config: TrainConfig, cluster: ClusterConfig, nodes: Allocation, logs: Path) -> Iterator[str]:
    yield f"--job-name={config.run.name}"
    yield f"--partition={cluster.partition}"
    for name in ("account", "qos", "constraint", "reservation"):
        if (value := getattr(cluster, name)) is not None:
            yield f"--{name}={value}"
    yield f"--nodes={nodes.num_nodes}"
    yield "--ntasks-per-node=1"
    yield f"--cpus-per-task={cluster.cpus_per_node}"
    yield f"--mem={cluster.memory_per_node}"
    if cluster.gpu_request == "gres":
        yield f"--gres=gpu:{config.resources.devices_per_node}"
    elif cluster.gpu_request == "gpus-per-node":
        yield f"--gpus-per-node={config.resources.devices_per_node}"
    yield f"--time={cluster.time_limit}"
    yield f"--signal=B:USR1@{cluster.signal_seconds}"
    yield "--requeue"
    yield "--open-mode=append"
    if cluster.exclude:
        yield f"--exclude={','.join(cluster.exclude)}"
    yield f"--output={logs}/job-%j.log"


def _settings(cluster: ClusterConfig, nodes: Allocation, script: Path) -> Iterator[str]:
    yield from cluster.setup
    yield from (f"module load {shlex.quote(module)}" for module in cluster.modules)
    python = Path(cluster.venv) / "bin" if cluster.venv else Path(sys.executable).parent
    if cluster.container is None:
        yield f"export PATH={shlex.quote(str(python))}:$PATH"
    else:
        mounts = ",".join(cluster.mounts)
        image = f"--container-image={cluster.container} --container-mounts={mounts}"
        yield f"export OREAL_CONTAINER={shlex.quote(image)}"
    if cluster.interface is not None:
        yield f"export GLOO_SOCKET_IFNAME={cluster.interface} NCCL_SOCKET_IFNAME={cluster.interface}"
    yield from (f"export {name}={shlex.quote(value)}" for name, value in cluster.environment.items())
    yield f"export OREAL_SLURM={shlex.quote(str(slurm_directory()))}"
    yield f"export OREAL_SCRIPT={shlex.quote(str(script))}"
    yield f"export OREAL_LOGS={shlex.quote(str(script.parent))}/logs-$SLURM_JOB_ID"
    yield f"export OREAL_TRAINER_NODES={nodes.trainer_nodes} OREAL_PROCESSES_PER_NODE={nodes.processes_per_node}"
    yield f"export OREAL_MAX_REQUEUES={cluster.max_requeues}"
    if cluster.node_check is not None:
        yield f"export OREAL_CHECK={shlex.quote(cluster.node_check)}"


def submitted(script: Path, *, after: str | None = None) -> str:
    """The new job's number. after: start when that job has ended, however it ended.

    Raises:
        ValueError: SLURM refuses the job; with its words.
    """
    command = ["sbatch", "--parsable"]
    if after is not None:
        command += [f"--dependency=afterany:{after}", "--kill-on-invalid-dep=yes"]
    return _sbatch([*command, str(script)]).split(";")[0]


def tested(script: Path) -> str:
    """When and where the job would start, in SLURM's words. Raises ValueError where it never could."""
    return _sbatch(["sbatch", "--test-only", str(script)])


def _sbatch(command: list[str]) -> str:
    try:
        outcome = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise ValueError("there is no sbatch here: submit on a login node of the cluster") from error
    words = (outcome.stdout + outcome.stderr).strip()
    if outcome.returncode:
        message = re.sub(r"^(sbatch|allocation failure|error): *", "", words)
        raise ValueError(f"SLURM refuses {command[-1]}: {message}")
    return words
