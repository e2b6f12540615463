"""A SLURM site: its schema, and what can be told before submission."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from oreal_megatron.config import ConfigError, NonNegative, Positive, Section, Strings, TrainConfig, Violation


class ClusterConfig(Section):
    """What a site asks for, and where things are there (conf/cluster)."""

    models: str
    """Directory of the Hugging Face directories that recipes name."""
    data: str
    """Directory of prompt and benchmark files."""
    runs: str
    """Directory of runs, on storage that every node sees."""
    shared: Strings
    """Roots of shared storage: what a job reads and writes must lie below one of them. Empty: file systems that are
    known to be a machine's own are refused for jobs of several nodes."""
    account: str | None
    partition: str
    qos: str | None
    constraint: str | None
    reservation: str | None
    server_partition: str | None
    """Of servers on nodes of their own, where these are another kind of nodes: the job is heterogeneous then."""
    server_constraint: str | None
    """Likewise."""
    time_limit: Annotated[str, Field(pattern=r"^(\d+-)?\d{1,2}:\d{2}:\d{2}$")]
    """[days-]hours:minutes:seconds of one job; the run goes on in the next."""
    signal_seconds: Positive
    """Before the time limit, when the trainer is asked to save and stop."""
    max_requeues: NonNegative
    """Of one job by itself, after time limits and preemptions."""
    exclude: Strings
    """Nodes that are known to be bad."""
    gpu_request: Literal["gpus-per-node", "gres", "none"]
    cpus_per_node: Positive
    memory_per_node: str
    """As for sbatch --mem; 0: all of a node's."""
    modules: Strings
    """Loaded before everything else."""
    venv: str | None
    """Virtual environment of the project that every node sees; null: that of the submission."""
    container: str | None
    """Image for srun --container-image (pyxis)."""
    mounts: Strings
    """Directories for --container-mounts."""
    interface: str | None
    """Network interface of gloo and NCCL; null: their choice."""
    environment: Mapping[str, str]
    """Variables of every process."""
    setup: Strings
    """Shell lines that run before the job's own."""
    node_check: str | None
    """Shell command that must succeed on every node before the run starts; a node where it fails is left out."""
    judge_nodes: NonNegative
    """Nodes that run `judge_command`, for verifier=rules_and_judge."""
    judge_command: str | None
    """Shell command that serves the judge at $JUDGE_PORT behind an OpenAI-compatible API; verifier.judge.endpoints are
    then those of the job."""


def parse_cluster(raw: Mapping[str, Any]) -> ClusterConfig:
    """Raises ConfigError with all violations; `cluster=none` has none of the keys."""
    if "partition" not in raw:
        raise ConfigError(
            [Violation("cluster", "none", "choose a site: cluster=NAME of conf/cluster (conf/cluster/slurm.yaml)")]
        )
    try:
        return ClusterConfig.model_validate({k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()})
    except ValidationError as error:
        raise ConfigError(
            [
                Violation(
                    ".".join(["cluster", *map(str, item["loc"])]),
                    None if item["type"] == "missing" else item["input"],
                    item["msg"][0].lower() + item["msg"][1:],
                )
                for item in error.errors()
            ]
        ) from error


def site_violations(cluster: ClusterConfig, config: TrainConfig, *, num_nodes: int) -> Iterator[Violation]:
    """What would fail after hours in a queue and can be told now. num_nodes: in cluster.partition."""
    yield from _path_violations(cluster, config, num_nodes)
    if cluster.signal_seconds >= seconds_of(cluster.time_limit):
        remedy = f"must be shorter than cluster.time_limit = {cluster.time_limit}, before which it comes"
        yield Violation("cluster.signal_seconds", cluster.signal_seconds, remedy)
    if cluster.container is not None and cluster.venv is not None:
        yield Violation("cluster.venv", cluster.venv, "null with a container, which brings its own environment")
    if cluster.venv is not None and not (Path(cluster.venv) / "bin" / "oreal-train").exists():
        yield Violation("cluster.venv", cluster.venv, "there is no bin/oreal-train in it")
    if (cluster.judge_nodes > 0) != (cluster.judge_command is not None):
        yield Violation("cluster.judge_command", cluster.judge_command, "belongs to cluster.judge_nodes > 0")
    if cluster.judge_nodes and config.verifier.judge.mode == "off":
        yield Violation("cluster.judge_nodes", cluster.judge_nodes, "0 without a judge, or verifier=rules_and_judge")
    yield from _partition_violations(cluster, config, num_nodes)


def _path_violations(cluster: ClusterConfig, config: TrainConfig, num_nodes: int) -> Iterator[Violation]:
    paths = {f"cluster.{name}": getattr(cluster, name) for name in ("models", "data", "runs")}
    paths["run.dir"] = config.run.dir
    if cluster.venv is not None:
        paths["cluster.venv"] = cluster.venv
    roots = [Path(root).resolve() for root in cluster.shared]
    for key, path in paths.items():
        if roots and not any(Path(path).resolve().is_relative_to(root) for root in roots):
            yield Violation(key, path, f"is not on shared storage: {', '.join(cluster.shared)} (cluster.shared)")
        elif not roots and num_nodes > 1 and (kind := file_system(Path(path))) in LOCAL_FILE_SYSTEMS:
            remedy = (
                f"lies on a file system of this machine ({kind}): name shared storage, or, where all nodes see it, "
            )
            yield Violation(key, path, remedy + "its root in cluster.shared")
    if config.run.dry_run:
        return
    files = {
        "model.path": config.model.path,
        "model.reward_model": config.model.reward_model,
        "data.train": config.data.train,
        "sft.demonstrations": config.sft.demonstrations if config.sft else None,
        **{f"evaluation.benchmarks.{name}.path": item.path for name, item in config.evaluation.benchmarks.items()},
    }
    for key, file in files.items():
        if file is not None and not Path(file).exists():
            yield Violation(key, file, "is not there")


# What each machine has for itself. Not an NFS, Lustre, GPFS, BeeGFS, Ceph or FUSE mount.
LOCAL_FILE_SYSTEMS = ("tmpfs", "ramfs", "overlay", "ext3", "ext4", "xfs", "btrfs", "zfs")


def file_system(path: Path) -> str:
    """Kind of the mounted file system that `path` is or would be on; empty where the system does not tell."""
    resolved, found, depth = path.resolve(), "", -1
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return ""
    for line in lines:
        before, _, after = line.partition(" - ")
        mount = Path(before.split()[4].replace("\\040", " "))
        if resolved.is_relative_to(mount) and len(mount.parts) >= depth:  # a later mount hides an earlier one
            found, depth = after.split()[0], len(mount.parts)
    return found


def seconds_of(time_limit: str) -> int:
    """Of [days-]hours:minutes:seconds."""
    days, _, clock = time_limit.rpartition("-")
    hours, minutes, seconds = map(int, clock.split(":"))
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def _partition_violations(cluster: ClusterConfig, config: TrainConfig, num_nodes: int) -> Iterator[Violation]:
    """Of what sinfo says, where there is a SLURM."""
    try:
        output = subprocess.run(
            ["sinfo", "--noheader", "--format=%R|%D|%G|%c|%l"], capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return
    partitions: dict[str, list[list[str]]] = {}
    for line in output.stdout.splitlines():
        name, *rest = line.split("|")
        partitions.setdefault(name, []).append(rest)
    if not partitions:
        return
    for key in ("partition", "server_partition"):
        if (name := getattr(cluster, key)) is not None and name not in partitions:
            yield Violation(f"cluster.{key}", name, f"there are {', '.join(sorted(partitions))}")
    if cluster.partition not in partitions:
        return
    rows = partitions[cluster.partition]
    nodes = sum(int(count) for count, *_ in rows)
    if num_nodes > nodes:
        yield Violation(
            "resources.trainer_devices",
            config.resources.trainer_devices,
            f"with its servers this is {num_nodes} nodes; partition {cluster.partition} has {nodes}",
        )
    if cluster.gpu_request != "none":
        most = max((int(n) for _, gres, *_ in rows for n in re.findall(r"gpu[^,]*?:(\d+)", gres)), default=0)
        if config.resources.devices_per_node > most:
            yield Violation(
                "resources.devices_per_node",
                config.resources.devices_per_node,
                f"nodes of {cluster.partition} have {most} GPUs; cluster.gpu_request: none asks for none",
            )
    cpus = max(int(cpus.rstrip("+")) for _, _, cpus, _ in rows)
    if cluster.cpus_per_node > cpus:
        yield Violation("cluster.cpus_per_node", cluster.cpus_per_node, f"nodes of {cluster.partition} have {cpus}")
    limit = rows[0][3]
    if re.fullmatch(r"(\d+-)?\d+:\d+:\d+", limit) and seconds_of(cluster.time_limit) > seconds_of(limit):
        remedy = f"{cluster.partition} allows {limit}; the run goes on in the next job"
        yield Violation("cluster.time_limit", cluster.time_limit, remedy)
