"""What a submission checks of a site: partitions of both components, and paths that all nodes and containers see."""

from __future__ import annotations

from typing import Any

import pytest
from omegaconf import OmegaConf

from oreal_megatron.compose import composed
from oreal_megatron.config import TrainConfig, Violation
from oreal_megatron.slurm import cluster as module
from oreal_megatron.slurm.cluster import parse_cluster, site_violations
from tests.unit.planner.test_recipes import recipe


def violations(*overrides: str, num_nodes: int = 1, num_apart: int = 0, config: TrainConfig) -> dict[str, Violation]:
    """Violations of a site with these values -> by key."""
    names = ("account=a", "partition=train", "models=/", "data=/", "runs=/", "venv=null")
    raw = composed(["cluster=slurm", *(f"cluster.{name}" for name in names), *overrides])
    site: Any = OmegaConf.to_container(raw["cluster"], resolve=True)
    found = site_violations(parse_cluster(site), config, num_nodes=num_nodes, num_apart=num_apart)
    return {violation.key: violation for violation in found}


@pytest.fixture
def sinfo(monkeypatch, tmp_path):
    """Partitions in the words of sinfo."""

    def say(*lines: str) -> None:
        program = tmp_path / "bin" / "sinfo"
        program.parent.mkdir(exist_ok=True)
        program.write_text("#!/bin/sh\ncat <<END\n" + "\n".join(lines) + "\nEND\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")

    return say


def test_both_components_are_held_against_their_partitions(sinfo):
    apart = recipe("oreal_32b_disaggregated")
    sinfo("train|8|gpu:8|96|infinite", "serve|4|gpu:4|48|4:00:00")
    found = violations("cluster.server_partition=serve", num_nodes=16, num_apart=8, config=apart)
    keys = {"rollout.sglang.num_servers", "resources.devices_per_node", "cluster.cpus_per_node", "cluster.time_limit"}
    assert keys <= set(found) and "resources.trainer_devices" not in found
    assert "It takes 8 nodes, partition serve has 4" in found["rollout.sglang.num_servers"].remedy
    sinfo("train|8|gpu:8|96|infinite", "serve|8|gpu:8|96|infinite")
    found = violations("cluster.server_partition=serve", num_nodes=16, num_apart=8, config=apart)
    assert not keys & set(found)
    assert "resources.trainer_devices" in violations(num_nodes=16, config=apart)
    assert set(violations("cluster.partition=no", config=apart)) >= {"cluster.partition"}


def test_servers_on_nodes_of_another_kind_need_shared_storage_too(monkeypatch):
    monkeypatch.setattr(module, "file_system", lambda path: "tmpfs")
    arithmetic = recipe("oreal_32b_disaggregated")
    found = violations("cluster.server_partition=serve", num_nodes=2, num_apart=1, config=arithmetic)
    assert "tmpfs" in found["run.dir"].remedy
    assert "run.dir" not in violations(num_nodes=1, config=arithmetic)


def test_every_path_that_the_job_reads_is_checked(tmp_path):
    config = recipe(
        "oreal_32b_disaggregated",
        *("rollout.sglang.transport=disk", f"rollout.sglang.weights_dir={tmp_path}/weights"),
        f"model.tokenizer={tmp_path}/tokenizer",
    )
    found = violations("cluster.shared=[/proc]", config=config)
    assert "does not exist" in found["model.tokenizer"].remedy
    assert "not on shared storage" in found["rollout.sglang.weights_dir"].remedy
    (tmp_path / "tokenizer").mkdir()
    container = ("cluster.container=image", "cluster.mounts=[/data]")
    found = violations(*container, config=config)
    assert {"model.tokenizer", "rollout.sglang.weights_dir", "run.dir"} <= set(found)
    assert "does not see it" in found["model.tokenizer"].remedy
    assert "model.tokenizer" not in violations("cluster.container=image", f"cluster.mounts=[{tmp_path}]", config=config)


def test_a_mount_may_have_the_name_of_a_link(tmp_path):
    (tmp_path / "lustre").mkdir()
    (tmp_path / "scratch").symlink_to(tmp_path / "lustre")
    config = recipe("oreal_32b_disaggregated", f"run.dir={tmp_path}/scratch/run")
    mounts = f"cluster.mounts=[{tmp_path}/scratch]"
    assert "run.dir" not in violations("cluster.container=image", mounts, config=config)


@pytest.mark.parametrize(
    ("text", "name"),
    [("a\nb", "control character 0x0a"), ("a\u00a0b", "NO-BREAK SPACE"), ("\u200b", "ZERO WIDTH SPACE")],
)
def test_what_slurm_does_not_take_is_named(text, name):
    config = recipe("oreal_32b_disaggregated")
    named = config.model_copy(update={"run": config.run.model_copy(update={"name": text})})
    assert name in violations(config=named)["run.name"].remedy
    found = violations(f'cluster.exclude=["node1", "{text}"]', config=config)
    assert (found["cluster.exclude"].value, name in found["cluster.exclude"].remedy) == (text, True)
