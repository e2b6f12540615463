"""Composition of conf/ and overrides with Hydra, validated by the schema. Imports no torch."""

from __future__ import annotations

import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from oreal_megatron.config import ConfigError, TrainConfig, Violation, fields_at, parse_config
from oreal_megatron.overrides import (
    check_overrides,
    composition_error,
    config_directory,
    search_path,
)

SITE = "cluster"
"""Name of the group with values of a site. It is composed with a run's configuration and is not part of it."""
PLACEHOLDERS = "/site/"
"""Prefix of the values that `with_placeholders` fills in."""
DEMOS = ("arithmetic", "arithmetic_sglang")
"""Experiments with the settings of a model of 0.15M parameters."""
_FROM_SITE = re.compile(r"\$\{cluster\.(\w+)\}")


def composed(overrides: Sequence[str], *, config_dir: Path | None = None) -> DictConfig:
    """Returns the configuration that `oreal-train` would compose from these overrides.

    config_dir: a directory with more options of groups, as for `oreal-train --config-dir`.

    Raises:
        ConfigError: an override names an unknown group, option or key, or cannot be read.
    """
    GlobalHydra.instance().clear()
    search = [] if config_dir is None else [search_path(config_dir)]
    check_overrides(overrides, config_dir)
    try:
        with initialize_config_dir(str(config_directory()), version_base="1.3"):
            whole = compose("config", overrides=[*overrides, *search], return_hydra_config=True)
    except Exception as error:  # Hydra raises errors of every kind, and nothing but Hydra runs here
        raise composition_error(error, overrides, config_dir) from error
    HydraConfig.instance().set_config(whole)  # run.name is the experiment's by default
    OmegaConf.set_readonly(whole.hydra, False)
    OmegaConf.set_struct(whole, False)
    del whole["hydra"]
    return whole


def validated(config: DictConfig) -> TrainConfig:
    """Returns the validated configuration.

    Raises:
        ConfigError: with all violations.
    """
    raw: Any = OmegaConf.to_container(config, resolve=False)
    violations = [Violation(key, "???", missing_value(key)) for key in missing_keys(raw)]
    if violations:
        raise ConfigError(violations)
    return parse_config(resolved(config))


def missing_value(key: str) -> str:
    """Returns the remedy for a key without a value, with the first sentence of the key's description."""
    if key.startswith(f"{SITE}."):
        return "It has no value. Set it in the file of conf/cluster, or as an override."
    field = _field_at(key)
    meaning = (field.description or "").split(". ")[0].rstrip(".") if field is not None else ""
    return f"It has no value. Set it{': ' + ' '.join(meaning.split()) if meaning else ''}."


def _field_at(key: str) -> Any:
    """Returns the schema's field of a key; None where there is none."""
    *parents, name = key.split(".")
    return fields_at(parents).get(name)


def resolved(config: DictConfig) -> dict[str, Any]:
    """Returns the run's part of the configuration as plain data, with interpolations resolved.

    Raises:
        ConfigError: an interpolation names a key that does not exist, or the demo is given another model and data.
    """
    try:
        raw: Any = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise composition_error(error, ()) from error
    raw.pop(SITE, None)
    _check_demo(raw)
    return raw


def _check_demo(raw: dict[str, Any]) -> None:
    """Refuses the demo, which is the default experiment, for a model and prompts that its settings do not fit."""
    experiment = str(HydraConfig.get().runtime.choices.get("experiment")) if HydraConfig.initialized() else ""
    given = [key for section, key in (("model", "path"), ("data", "train")) if (raw.get(section) or {}).get(key)]
    if experiment in DEMOS and given == ["path", "train"]:
        remedy = (
            "Its prompt length, learning rates, evaluation and run.name are those of a small model of arithmetic, and "
            "model.path and data.train are set. Choose experiment=own_model."
        )
        raise ConfigError([Violation("experiment", experiment, remedy)])


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


def with_missing_values(violations: Sequence[Violation]) -> list[Violation]:
    """Returns the violations, those of missing values with the value ??? and its remedy.

    A placeholder of `with_placeholders` is text, which fits no number.
    """
    return [
        Violation(v.key, "???", missing_value(v.key))
        if v.value == "???" or str(v.value).startswith(PLACEHOLDERS)
        else v
        for v in violations
    ]


def with_placeholders(config: DictConfig) -> list[str]:
    """Fills missing values in place with placeholders, for commands that need no site. Returns the keys filled."""
    raw: Any = OmegaConf.to_container(config, resolve=False)
    missing = sorted(_missing(raw))
    for key in missing:
        field = _field_at(key)
        is_mapping = field is not None and typing.get_origin(field.annotation) is Mapping
        OmegaConf.update(config, key, {"name": PLACEHOLDERS + key} if is_mapping else PLACEHOLDERS + key)
    return missing
