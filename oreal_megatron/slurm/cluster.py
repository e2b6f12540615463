"""A SLURM site: its schema, and checks of it before submission."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import unquote, urlsplit

from pydantic import Field

from oreal_megatron.config import (
    ConfigError,
    NonNegative,
    Positive,
    Section,
    Strings,
    TrainConfig,
    Violation,
    parse_section,
)


class ClusterConfig(Section):
    """Values of a site: directories, batch options, environment (conf/cluster)."""

    models: str
    """Directory of the Hugging Face directories that the oreal_* experiments name."""
    data: str
    """Directory of prompt and benchmark files."""
    runs: str
    """Directory of runs, on storage that every node sees."""
    shared: Strings
    """Roots of shared storage. Paths that a job reads and writes must be below them. Empty: jobs of several nodes
    refuse paths on file systems that are local to a machine."""
    account: str | None
    """Account, as for sbatch. null: the default account."""
    partition: str
    """Partition, as for sbatch."""
    qos: str | None
    """Quality of service, as for sbatch. null: none."""
    constraint: str | None
    """Constraint on nodes, as for sbatch. null: none."""
    reservation: str | None
    """Reservation, as for sbatch. null: none."""
    server_partition: str | None
    """Partition of disaggregated servers, if they need another kind of nodes. The job is then heterogeneous. null: the
    same partition."""
    server_constraint: str | None
    """Constraint on the nodes of disaggregated servers, which also makes the job heterogeneous. null: none."""
    time_limit: Annotated[str, Field(pattern=r"^(\d+-)?\d{1,2}:\d{2}:\d{2}$")]
    """Time limit of one job, as [days-]hours:minutes:seconds. The run continues in the next job."""
    signal_seconds: Positive
    """Seconds before the time limit at which the trainer is asked to save and stop."""
    max_requeues: NonNegative
    """Number of times that a job requeues itself after time limits and preemptions."""
    exclude: Strings
    """Nodes not to use."""
    gpu_request: Literal["gpus-per-node", "gres", "none"]
    """Option that asks for GPUs. none: jobs get whole nodes."""
    cpus_per_node: Positive
    """CPUs of a node that a job uses."""
    memory_per_node: str
    """Memory of a node, as for sbatch --mem. 0: all of it."""
    modules: Strings
    """Environment modules to load at the start of a job, as `setup` runs."""
    venv: str | None
    """Virtual environment of the project on shared storage. null: the environment that submits the job."""
    container: str | None
    """Image of Apptainer (a file NAME.sif), or for srun --container-image (pyxis). null: no container."""
    mounts: Strings
    """Directories that the container sees, as for apptainer --bind and --container-mounts."""
    interface: str | None
    """Network interface of gloo and NCCL. null: they choose."""
    environment: Mapping[str, str]
    """Environment variables of every process."""
    setup: Strings
    """Shell lines that run once at the start of a job, on its first node. Every process gets what they export."""
    node_check: str | None
    """Shell command that checks a node before the run starts. A node where it fails, or takes 10 minutes, is excluded.
    null: no check."""
    judge_nodes: NonNegative
    """Number of nodes that run `judge_command`, for verifier=rules_and_judge."""
    judge_command: str | None
    """Shell command that serves the judge at $JUDGE_PORT behind an OpenAI-compatible API. The job sets
    verifier.judge.endpoints. null: no judge."""


def is_site(raw: Mapping[str, Any]) -> bool:
    """Returns whether the section `cluster` describes a site, as that of `cluster=none` does not."""
    return "partition" in raw


def parse_cluster(raw: Mapping[str, Any]) -> ClusterConfig:
    """Validates the values of a site.

    Raises:
        ConfigError: with all violations. `cluster=none` has no keys of a site.
    """
    if not is_site(raw):
        raise ConfigError(
            [Violation("cluster", "none", "There is no site. Copy conf/cluster/slurm.yaml, and set cluster=NAME.")]
        )
    return parse_section("cluster", {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}, ClusterConfig)


def site_violations(
    cluster: ClusterConfig, config: TrainConfig, *, num_nodes: int, num_apart: int
) -> Iterator[Violation]:
    """Yields every violation of the site's rules that would otherwise show after hours in a queue.

    num_nodes: number of nodes of the job. num_apart: number of those that are a second component, for servers.
    """
    yield from _path_violations(cluster, config, num_nodes)
    yield from _text_violations(cluster, config)
    if cluster.signal_seconds >= seconds_of(cluster.time_limit):
        remedy = f"It counts back from the time limit. Set it below cluster.time_limit={cluster.time_limit}."
        yield Violation("cluster.signal_seconds", cluster.signal_seconds, remedy)
    if cluster.container is not None and cluster.venv is not None:
        yield Violation("cluster.venv", cluster.venv, "A container has its own environment. Set cluster.venv=null.")
    if cluster.venv is not None and not (Path(cluster.venv) / "bin" / "oreal-train").exists():
        yield Violation("cluster.venv", cluster.venv, "It has no bin/oreal-train. Name the project's environment.")
    if (cluster.judge_nodes > 0) != (cluster.judge_command is not None):
        remedy = "It needs judge nodes, and they need it. Set both, or cluster.judge_nodes=0 and null here."
        yield Violation("cluster.judge_command", cluster.judge_command, remedy)
    if cluster.judge_nodes and config.verifier.judge.mode == "off":
        remedy = "The run has no judge. Set cluster.judge_nodes=0, or verifier=rules_and_judge."
        yield Violation("cluster.judge_nodes", cluster.judge_nodes, remedy)
    yield from _partition_violations(cluster, config, num_nodes - num_apart, num_apart)


def _path_violations(cluster: ClusterConfig, config: TrainConfig, num_nodes: int) -> Iterator[Violation]:
    """Yields every path that does not exist, or that some node or the container would not see."""
    site = {f"cluster.{name}": getattr(cluster, name) for name in ("models", "data", "runs")}
    if cluster.container is None:
        environment = Path(cluster.venv or sys.prefix)
        site["cluster.venv"] = str(environment)
        if (checkout := editable_project(environment)) is not None:
            site["cluster.venv (the editable installation in it)"] = str(checkout)
    elif cluster.container.endswith((".sif", ".sqsh")):
        site["cluster.container"] = cluster.container
    files = {} if config.run.dry_run else _files(config)
    images = {"cluster.container": site["cluster.container"]} if "cluster.container" in site else {}
    for key, path in {**files, **images}.items():
        if not Path(path).exists():
            yield Violation(key, path, "It does not exist. Set it to an existing path.")
    read = {key: path for key, path in files.items() if Path(path).exists()}
    read["run.dir"] = absolute(config.run.dir)
    servers = config.rollout.sglang
    if servers is not None and servers.transport == "disk" and servers.weights_dir is not None:
        read["rollout.sglang.weights_dir"] = servers.weights_dir  # the run makes it
    if cluster.container is not None:
        # A mount is SOURCE, SOURCE:PLACE or SOURCE:PLACE:FLAGS.
        places = [(mount.split(":") * 2)[1] for mount in cluster.mounts]
        for key, path in read.items():
            if not any(Path(path).is_relative_to(place) for place in places):
                remedy = (
                    "The container does not see it. Set it to an absolute path below a directory of cluster.mounts, "
                    "or add its directory there."
                )
                yield Violation(key, path, remedy)
    elif servers is not None and "/" in (python := servers.python or ""):
        read["rollout.sglang.python"] = str(Path(python).absolute().parent)
    roots = [Path(root).resolve() for root in cluster.shared]
    for key, path in {**site, **read}.items():
        if roots and not any(Path(path).resolve().is_relative_to(root) for root in roots):
            yield Violation(
                key, path, f"It is not on shared storage. Set it to a path below {' or '.join(cluster.shared)}."
            )
        elif not roots and num_nodes > 1 and (kind := file_system(Path(path))) in LOCAL_FILE_SYSTEMS:
            remedy = (
                f"It is on a local file system of this machine ({kind}). Set it to a path on shared storage, or add "
                "its root to cluster.shared if all nodes see it."
            )
            yield Violation(key, path, remedy)


def _files(config: TrainConfig) -> dict[str, str]:
    """Returns the files and directories that the run reads -> by key."""
    tokenizer = config.model.tokenizer
    files = {
        "model.path": config.model.path,
        "model.tokenizer": None if tokenizer in ("arithmetic", config.model.path) else tokenizer,
        "model.reward_model": config.model.reward_model,
        **config.data_paths,
    }
    return {key: file for key, file in files.items() if file is not None}


def editable_project(environment: Path) -> Path | None:
    """Returns the checkout that an environment runs; None where the package itself is installed in it."""
    packages = [str(path) for path in environment.glob("lib/python3.*/site-packages")]
    for distribution in importlib.metadata.distributions(name="oreal_megatron", path=packages):
        origin = json.loads(distribution.read_text("direct_url.json") or "{}")
        if origin.get("dir_info", {}).get("editable"):
            return Path(unquote(urlsplit(origin["url"]).path))
    return None


_HEADER_KEYS = (
    *("account", "partition", "qos", "constraint", "reservation", "server_partition", "server_constraint"),
    "memory_per_node",
)
"""Keys of a site whose texts become options in the header of the batch script, besides its list `exclude`."""


def _text_violations(cluster: ClusterConfig, config: TrainConfig) -> Iterator[Violation]:
    """Yields every value that the batch script, SLURM or pyxis could not read as it is."""
    directory = absolute(config.run.dir)
    texts = [(f"cluster.{name}", getattr(cluster, name)) for name in _HEADER_KEYS]
    texts += [("cluster.exclude", node) for node in cluster.exclude]
    for key, text in [*texts, ("run.name", config.run.name), ("run.dir", directory)]:
        if unprintable := next((c for c in text or "" if not c.isprintable()), None):
            name = unicodedata.name(unprintable, f"control character {ord(unprintable):#04x}")
            yield Violation(key, text, f"SLURM does not take the {name} in it. Remove it.")
    if "\\" in directory:
        remedy = "SLURM replaces nothing in the name of a log file with a backslash. Set it to a path without one."
        yield Violation("run.dir", directory, remedy)
    for name in cluster.environment:
        if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
            remedy = "It is no name of an environment variable. Use letters, digits and underscores."
            yield Violation("cluster.environment", name, remedy)
    for mount in cluster.mounts:
        if "," in mount:
            yield Violation("cluster.mounts", mount, "pyxis separates mounts by commas. Mount a directory above it.")


def absolute(directory: str) -> str:
    """Returns the absolute path of a directory, with its links as they are: a mount may have the name of a link."""
    return os.path.abspath(directory)


# File systems that are local to a machine, unlike NFS, Lustre, GPFS, BeeGFS, Ceph and FUSE mounts.
LOCAL_FILE_SYSTEMS = ("tmpfs", "ramfs", "overlay", "ext3", "ext4", "xfs", "btrfs", "zfs")


def file_system(path: Path) -> str:
    """Returns the kind of the file system that `path` is or would be on; empty if unknown."""
    resolved, found, depth = path.resolve(), "", -1
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return ""
    for line in lines:
        before, _, after = line.partition(" - ")
        mount = Path(before.split()[4].replace("\\040", " "))
        if resolved.is_relative_to(mount) and len(mount.parts) >= depth:  # a later mount hides an earlier mount
            found, depth = after.split()[0], len(mount.parts)
    return found


def seconds_of(time_limit: str) -> int:
    """Returns the seconds of a [days-]hours:minutes:seconds."""
    days, _, clock = time_limit.rpartition("-")
    hours, minutes, seconds = map(int, clock.split(":"))
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def _partition_violations(
    cluster: ClusterConfig, config: TrainConfig, num_nodes: int, num_apart: int
) -> Iterator[Violation]:
    """Yields every violation of the limits that sinfo shows; none where there is no SLURM.

    num_nodes, num_apart: number of nodes in the first component of the job, and in a second one for servers.
    """
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
    servers = config.rollout.sglang
    asked = {"partition": (num_nodes, "resources.trainer_devices", config.resources.trainer_devices)}
    if num_apart and servers is not None:
        asked["server_partition"] = (num_apart, "rollout.sglang.num_servers", servers.num_servers)
    found: dict[str, Violation] = {}  # keys of both components have one violation
    for key in ("partition", "server_partition"):
        name = getattr(cluster, key)
        if name is not None and name not in partitions:
            remedy = f"There is no such partition. Set it to {' or '.join(sorted(partitions))}."
            yield Violation(f"cluster.{key}", name, remedy)
        elif key in asked and (rows := partitions.get(name := name or cluster.partition)):
            for violation in _component_violations(cluster, config, name, rows, *asked[key]):
                found.setdefault(violation.key, violation)
    yield from found.values()


def _component_violations(
    cluster: ClusterConfig,
    config: TrainConfig,
    partition: str,
    rows: Sequence[Sequence[str]],
    num_nodes: int,
    key: str,
    value: int | None,
) -> Iterator[Violation]:
    """Yields every violation of a partition's limits by one component of the job.

    rows: (number of nodes, generic resources, CPUs, time limit), in the words of sinfo. num_nodes: of the component.
    key, value: what its number of nodes comes from.
    """
    nodes = sum(int(count) for count, *_ in rows)
    if num_nodes > nodes:
        remedy = f"It takes {num_nodes} nodes, partition {partition} has {nodes}. Use fewer."
        yield Violation(key, value, remedy)
    if cluster.gpu_request != "none":
        most = max((int(n) for _, gres, *_ in rows for n in re.findall(r"gpu[^,]*?:(\d+)", gres)), default=0)
        if config.resources.devices_per_node > most:
            yield Violation(
                "resources.devices_per_node",
                config.resources.devices_per_node,
                f"Nodes of {partition} have {most} GPUs. Set it to {most}, or cluster.gpu_request=none.",
            )
    cpus = max(int(cpus.rstrip("+")) for _, _, cpus, _ in rows)
    if cluster.cpus_per_node > cpus:
        remedy = f"Nodes of {partition} have {cpus} CPUs. Set it to at most {cpus}."
        yield Violation("cluster.cpus_per_node", cluster.cpus_per_node, remedy)
    limit = rows[0][3]
    if re.fullmatch(r"(\d+-)?\d+:\d+:\d+", limit) and seconds_of(cluster.time_limit) > seconds_of(limit):
        remedy = f"Partition {partition} allows {limit}. Set it to that; the run continues in the next job."
        yield Violation("cluster.time_limit", cluster.time_limit, remedy)
