"""Everything that is wrong with a submission, at once: what is missing, the run, the site, the two together."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf

from oreal_megatron.compose import PLACEHOLDERS, SITE, missing_keys, resolved, with_placeholders
from oreal_megatron.config import ConfigError, TrainConfig, Violation, parse_config
from oreal_megatron.slurm.cluster import ClusterConfig, parse_cluster, site_violations
from oreal_megatron.slurm.sbatch import Allocation, nodes_of_another_kind

T = TypeVar("T")


def checked(
    raw: DictConfig, allocate: Callable[[TrainConfig, ClusterConfig], Allocation]
) -> tuple[TrainConfig, ClusterConfig, Allocation]:
    """raw: as composed; a dry run is shrunk already.

    Raises:
        ConfigError: with all that can be told, each with its key and what would be right.
    """
    plain: Any = OmegaConf.to_container(raw, resolve=False)
    missing = {*missing_keys(plain), *(f"{SITE}.{k}" for k, v in plain[SITE].items() if v == "???")}
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
        config = error.config  # where its sections only disagree, the rest can be looked at all the same
    cluster = attempted(lambda: parse_cluster(site))
    nodes = None
    if config is not None and cluster is not None:
        nodes = attempted(partial(allocate, config, cluster))
        num_nodes = nodes.num_nodes - nodes_of_another_kind(cluster, nodes) if nodes else 1
        violations += site_violations(cluster, config, num_nodes=num_nodes)
    # What is wrong with a placeholder is that it is one.
    violations = [v for v in violations if v.key not in missing and not str(v.value).startswith(PLACEHOLDERS)]
    lacking = [Violation(key, "???", "must be given: in conf/cluster, or here") for key in sorted(missing)]
    if lacking or violations:
        raise ConfigError(lacking + violations)
    assert config is not None and cluster is not None and nodes is not None
    return config, cluster, nodes
