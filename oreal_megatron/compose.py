"""Composition of conf/ and overrides with Hydra, validated by the schema. Imports no torch."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from oreal_megatron.config import ConfigError, TrainConfig, Violation, fields_at, parse_config, unknown_key

SITE = "cluster"
"""Name of the group with values of a site. It is composed with a run's configuration and is not part of it."""
PLACEHOLDERS = "/site/"
"""Prefix of the values that `with_placeholders` fills in."""
COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException)
"""Errors that Hydra raises while it composes; `composition_error` explains them."""
_FROM_SITE = re.compile(r"\$\{cluster\.(\w+)\}")


def config_directory() -> Path:
    """Returns conf/ of the checkout, or of the installed wheel where there is no checkout."""
    checkout = Path(__file__).resolve().parent.parent / "conf"
    return checkout if checkout.is_dir() else Path(sys.prefix) / "share" / "oreal_megatron" / "conf"


def composed(overrides: Sequence[str]) -> DictConfig:
    """Returns the configuration that `oreal-train` would compose from these overrides.

    Raises:
        ConfigError: an override names an unknown group, option or key.
    """
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_directory()), version_base="1.3"):
            whole = compose("config", overrides=list(overrides), return_hydra_config=True)
    except COMPOSITION_ERRORS as error:
        raise composition_error(error, overrides) from error
    HydraConfig.instance().set_config(whole)  # run.name is the experiment's by default
    OmegaConf.set_readonly(whole.hydra, False)
    OmegaConf.set_struct(whole, False)
    del whole["hydra"]
    return whole


def composition_error(error: Exception, overrides: Iterable[str]) -> ConfigError:
    """Returns the error with a violation for every override that cannot be composed, or with Hydra's own message."""
    message = " ".join(str(error).split())
    violations = []
    for override in overrides:
        key, _, value = override.partition("=")
        if (remedy := _remedy(key, value, message)) is not None:
            violations.append(Violation(key, value, remedy))
    return ConfigError(violations or [Violation("(composition)", None, message)])


def _remedy(key: str, value: str, message: str) -> str | None:
    """Returns what is wrong with an override; None where it names an existing group and option, or key.

    message: Hydra's, which tells a known key that the composed options do not set.
    """
    if key.startswith(("~", "hydra", "-")):
        return None
    directory, name = config_directory(), key.lstrip("+")
    groups = sorted(path.name for path in directory.iterdir() if path.is_dir() and path.name != "hydra")
    if name in groups:
        options = sorted(path.stem for path in (directory / name).glob("*.yaml"))
        return None if value in options or "," in value else unknown_key(value, options).replace("key", "option")
    first, *path = name.split(".")
    if first not in groups and first not in TrainConfig.model_fields:
        return unknown_key(first, {*groups, *TrainConfig.model_fields})
    if first not in TrainConfig.model_fields:
        known: Iterable[str] = {key for file in (directory / first).glob("*.yaml") for key in _top_level_keys(file)}
        return None if not path or path[0] in known else unknown_key(path[0], known)
    for index, part in enumerate(path):
        fields = fields_at([first, *path[:index]])
        if fields and part not in fields:
            return unknown_key(part, fields)
    if not key.startswith("+") and f"'{name}'" in message:
        return f"The chosen options do not set this key. Choose an option that does, or write +{name}={value}."
    return None


def _top_level_keys(file: Path) -> Iterable[str]:
    return (yaml.safe_load(file.read_text()) or {}).keys()


def validated(config: DictConfig) -> TrainConfig:
    """Returns the validated configuration.

    Raises:
        ConfigError: with all violations.
    """
    raw: Any = OmegaConf.to_container(config, resolve=False)
    violations = [Violation(key, "???", "The key has no value. Set it.") for key in missing_keys(raw)]
    if violations:
        raise ConfigError(violations)
    return parse_config(resolved(config))


def resolved(config: DictConfig) -> dict[str, Any]:
    """Returns the run's part of the configuration as plain data, with interpolations resolved.

    Raises:
        ConfigError: an interpolation names a key that does not exist.
    """
    try:
        raw: Any = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError([Violation("(composition)", None, str(error).strip().replace("\n", " "))]) from error
    raw.pop(SITE, None)
    return raw


def missing_keys(raw: dict[str, Any]) -> list[str]:
    """Returns the keys of the run whose value is ???, and the keys of the site that the run reads and that are ???.

    OmegaConf's own search stops at the first interpolation of a missing value.
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
    """Fills missing values in place with placeholders, for commands that need no site. Returns the keys filled."""
    raw: Any = OmegaConf.to_container(config, resolve=False)
    missing = sorted(_missing(raw))
    for key in missing:
        OmegaConf.update(config, key, PLACEHOLDERS + key)
    return missing
