"""Checks of a submission: missing values, the run, the site, and both together."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf

from oreal_megatron.compose import PLACEHOLDERS, SITE, missing_keys, missing_value, resolved, with_placeholders
from oreal_megatron.config import ConfigError, TrainConfig, Violation, parse_config
from oreal_megatron.slurm.cluster import ClusterConfig, is_site, parse_cluster, site_violations
from oreal_megatron.slurm.sbatch import Allocation, nodes_of_another_kind

T = TypeVar("T")


def checked(
    raw: DictConfig, allocate: Callable[[TrainConfig, ClusterConfig], Allocation]
) -> tuple[TrainConfig, ClusterConfig, Allocation]:
    """Returns the validated run, site and allocation.

    raw: the composed configuration, shrunk already for a dry run.
    allocate: returns the nodes of the job.

    Raises:
        ConfigError: with all violations.
    """
    plain: Any = OmegaConf.to_container(raw, resolve=False)
    missing = {*missing_keys(plain), *(f"{SITE}.{k}" for k, v in plain[SITE].items() if v == "???")}
    if not is_site(plain[SITE]):  # the file of the site that is to be chosen gives its keys values
        missing = {key for key in missing if not key.startswith(f"{SITE}.")}
    violations: list[Violation] = []
    filled = OmegaConf.create(plain)
    with_placeholders(filled)
    site: Any = OmegaConf.to_container(filled[SITE], resolve=True)

    def attempted(step: Callable[[], T]) -> T | None:
        try:
            return step()
        except ConfigError as error:
            violations.extend(error.violations)
            return None

    try:
        config: TrainConfig | None = parse_config(resolved(filled))
    except ConfigError as error:
        violations.extend(error.violations)
        config = error.config  # complete where only checks across sections failed
    cluster = attempted(lambda: parse_cluster(site))
    nodes = None
    if config is not None and cluster is not None:
        nodes = attempted(partial(allocate, config, cluster))
        num_nodes, num_apart = (nodes.num_nodes, nodes_of_another_kind(cluster, nodes)) if nodes else (1, 0)
        violations += site_violations(cluster, config, num_nodes=num_nodes, num_apart=num_apart)
    # A placeholder stands for a missing value, which has its own violation.
    violations = [v for v in violations if v.key not in missing and not str(v.value).startswith(PLACEHOLDERS)]
    lacking = [Violation(key, "???", missing_value(key)) for key in sorted(missing)]
    if lacking or violations:
        raise ConfigError(lacking + violations)
    assert config is not None and cluster is not None and nodes is not None
    return config, cluster, nodes
