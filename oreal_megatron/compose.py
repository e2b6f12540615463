"""From conf/ and overrides to a validated configuration: Hydra composes, the schema decides. No torch."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from oreal_megatron.config import ConfigError, TrainConfig, Violation, parse_config

SITE = "cluster"
"""The group of what belongs to a site: it is composed with a run and is no part of it."""
PLACEHOLDERS = "/site/"
"""What `with_placeholders` fills in begins so."""
_FROM_SITE = re.compile(r"\$\{cluster\.(\w+)\}")


def config_directory() -> Path:
    """conf/ beside the package in a checkout, or where an installed wheel puts it."""
    checkout = Path(__file__).resolve().parent.parent / "conf"
    return checkout if checkout.is_dir() else Path(sys.prefix) / "share" / "oreal_megatron" / "conf"


def composed(overrides: Sequence[str]) -> DictConfig:
    """What `oreal-train` would compose of these overrides.

    Raises:
        ConfigError: an override names a group, an option or a key that there is not.
    """
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_directory()), version_base="1.3"):
            whole = compose("config", overrides=list(overrides), return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        message = " ".join(str(error).split())
        raise ConfigError([Violation("(composition)", " ".join(overrides), message)]) from error
    HydraConfig.instance().set_config(whole)  # run.name is the experiment's by default
    OmegaConf.set_readonly(whole.hydra, False)
    OmegaConf.set_struct(whole, False)
    del whole["hydra"]
    return whole


def validated(config: DictConfig) -> TrainConfig:
    """Raises ConfigError with all violations at once."""
    raw: Any = OmegaConf.to_container(config, resolve=False)
    violations = [Violation(key, "???", "must be given on the command line or in a file") for key in missing_keys(raw)]
    if violations:
        raise ConfigError(violations)
    return parse_config(resolved(config))


def resolved(config: DictConfig) -> dict[str, Any]:
    """The run's part as plain data."""
    try:
        raw: Any = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError([Violation("(composition)", None, str(error).strip().replace("\n", " "))]) from error
    raw.pop(SITE, None)
    return raw


def missing_keys(raw: dict[str, Any]) -> list[str]:
    """Keys of the run whose value is ???, and those of the site that it reads.

    OmegaConf's own search stops at the first interpolation of one.
    """
    site = raw.get(SITE) or {}
    run = {name: value for name, value in raw.items() if name != SITE}
    found = set(_missing(run))
    text = " ".join(_texts(run))
    found |= {f"{SITE}.{name}" for name in _FROM_SITE.findall(text) if site.get(name) == "???"}
    return sorted(found)


def _missing(value: Any, path: str = "") -> Iterator[str]:
    if value == "???":
        yield path
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _missing(inner, f"{path}.{name}" if path else str(name))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _texts(inner)


def with_placeholders(config: DictConfig) -> list[str]:
    """Fills what is missing in place, for whoever needs no site, and returns its keys."""
    raw: Any = OmegaConf.to_container(config, resolve=False)
    missing = sorted(_missing(raw))
    for key in missing:
        OmegaConf.update(config, key, PLACEHOLDERS + key)
    return missing
