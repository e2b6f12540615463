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
    """Roots of shared storage; with any given, the three directories must lie below one of them."""
    account: str | None
    partition: str
    qos: str | None
    constraint: str | None
    reservation: str | None
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
    """What would fail after hours in a queue and can be told now."""
    paths = {f"cluster.{name}": getattr(cluster, name) for name in ("models", "data", "runs")}
    paths["run.dir"] = config.run.dir
    for key, path in paths.items():
        roots = [Path(root).resolve() for root in cluster.shared]
        if roots and not any(Path(path).resolve().is_relative_to(root) for root in roots):
            yield Violation(key, path, f"is not on shared storage: {', '.join(cluster.shared)} (cluster.shared)")
    if not config.run.dry_run:
        for key, file in {"model.path": config.model.path, "data.train": config.data.train}.items():
            if file is not None and not Path(file).exists():
                yield Violation(key, file, "is not there")
    if cluster.container is not None and cluster.venv is not None:
        yield Violation("cluster.venv", cluster.venv, "null with a container, which brings its own environment")
    if cluster.venv is not None and not (Path(cluster.venv) / "bin" / "oreal-train").exists():
        yield Violation("cluster.venv", cluster.venv, "there is no bin/oreal-train in it")
    if (cluster.judge_nodes > 0) != (cluster.judge_command is not None):
        yield Violation("cluster.judge_command", cluster.judge_command, "belongs to cluster.judge_nodes > 0")
    if cluster.judge_nodes and config.verifier.judge.mode == "off":
        yield Violation("cluster.judge_nodes", cluster.judge_nodes, "0 without a judge, or verifier=rules_and_judge")
    yield from _partition_violations(cluster, config, num_nodes)


def _partition_violations(cluster: ClusterConfig, config: TrainConfig, num_nodes: int) -> Iterator[Violation]:
    """Of what sinfo says, where there is a SLURM."""
    try:
        output = subprocess.run(
            ["sinfo", "--noheader", "--format=%R|%D|%G|%c"], capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return
    partitions: dict[str, list[list[str]]] = {}
    for line in output.stdout.splitlines():
        name, *rest = line.split("|")
        partitions.setdefault(name, []).append(rest)
    if not partitions:
        return
    if cluster.partition not in partitions:
        yield Violation("cluster.partition", cluster.partition, f"there are {', '.join(sorted(partitions))}")
        return
    rows = partitions[cluster.partition]
    nodes = sum(int(count) for count, _, _ in rows)
    if num_nodes > nodes:
        yield Violation(
            "resources.trainer_devices",
            config.resources.trainer_devices,
            f"with its servers this is {num_nodes} nodes; partition {cluster.partition} has {nodes}",
        )
    if cluster.gpu_request != "none":
        most = max((int(n) for _, gres, _ in rows for n in re.findall(r"gpu[^,]*?:(\d+)", gres)), default=0)
        if config.resources.devices_per_node > most:
            yield Violation(
                "resources.devices_per_node",
                config.resources.devices_per_node,
                f"nodes of {cluster.partition} have {most} GPUs; cluster.gpu_request: none asks for none",
            )
    cpus = max(int(cpus.rstrip("+")) for _, _, cpus in rows)
    if cluster.cpus_per_node > cpus:
        yield Violation("cluster.cpus_per_node", cluster.cpus_per_node, f"nodes of {cluster.partition} have {cpus}")
