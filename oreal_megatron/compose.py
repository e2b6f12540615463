"""Composition of conf/ and overrides with Hydra, validated by the schema. Imports no torch."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from oreal_megatron.config import ConfigError, TrainConfig, Violation, fields_at, parse_config, unknown_key

SITE = "cluster"
"""Name of the group with values of a site. It is composed with a run's configuration and is not part of it."""
PLACEHOLDERS = "/site/"
"""Prefix of the values that `with_placeholders` fills in."""
COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, yaml.YAMLError)
"""Errors that Hydra raises while it composes; `composition_error` explains them."""
DEMOS = ("arithmetic", "arithmetic_sglang")
"""Experiments with the settings of a model of 0.15M parameters."""
_FROM_SITE = re.compile(r"\$\{cluster\.(\w+)\}")


def config_directory() -> Path:
    """Returns conf/ of the checkout, or of the installed wheel where there is no checkout."""
    checkout = Path(__file__).resolve().parent.parent / "conf"
    return checkout if checkout.is_dir() else Path(sys.prefix) / "share" / "oreal_megatron" / "conf"


def composed(overrides: Sequence[str], *, config_dir: Path | None = None) -> DictConfig:
    """Returns the configuration that `oreal-train` would compose from these overrides.

    config_dir: a directory with more options of groups, as for `oreal-train --config-dir`.

    Raises:
        ConfigError: an override names an unknown group, option or key, or cannot be read.
    """
    GlobalHydra.instance().clear()
    search = [] if config_dir is None else [search_path(config_dir)]
    try:
        with initialize_config_dir(str(config_directory()), version_base="1.3"):
            whole = compose("config", overrides=[*overrides, *search], return_hydra_config=True)
    except COMPOSITION_ERRORS as error:
        raise composition_error(error, overrides, config_dir) from error
    HydraConfig.instance().set_config(whole)  # run.name is the experiment's by default
    OmegaConf.set_readonly(whole.hydra, False)
    OmegaConf.set_struct(whole, False)
    del whole["hydra"]
    return whole


def search_path(config_dir: Path) -> str:
    """Returns the override that adds a directory with options of groups. Raises ConfigError if it does not exist."""
    if not config_dir.is_dir():
        remedy = "There is no such directory. Name one with folders such as objective/ or experiment/."
        raise ConfigError([Violation("--config-dir", str(config_dir), remedy)])
    path = _quoted(f"file://{config_dir.resolve()}")
    return f"hydra.searchpath=[{path}]"


def composition_error(error: Exception, overrides: Iterable[str], config_dir: Path | None = None) -> ConfigError:
    """Returns the error with a violation for every override that cannot be composed, or with Hydra's own message."""
    message = " ".join(str(error).split())
    directories = [config_directory(), *([config_dir] if config_dir is not None and config_dir.is_dir() else [])]
    violations = []
    for override in overrides:
        key, _, value = override.partition("=")
        if (remedy := _unreadable(override) or _remedy(key, value, message, directories)) is not None:
            violations.append(Violation(key, value, remedy))
    return ConfigError(violations or [Violation("(composition)", None, message)])


def _unreadable(override: str) -> str | None:
    """Returns the remedy for an override that is not in Hydra's grammar; None where it is."""
    key, equals, value = override.partition("=")
    if _is_readable(override):
        return None
    if not equals:
        return f"It is no override. Write {key}=VALUE."
    quoted = f"{key}={_quoted(value)}"
    if _is_readable(quoted):
        return f"The value has characters that need quotes, inside of the shell's. Write {shlex.quote(quoted)}."
    return "The key has characters that a key on the command line cannot have. Set it in a file below --config-dir."


def _is_readable(override: str) -> bool:
    try:
        OverridesParser.create().parse_override(override)
    except HydraException:
        return False
    return True


def _quoted(value: str) -> str:
    """Returns a text as a quoted value of Hydra's grammar, in which a backslash escapes before a quote alone."""
    return '"' + re.sub(r'(\\*)"', r"\1\1\"", re.sub(r"(\\+)$", r"\1\1", value)) + '"'


def _remedy(key: str, value: str, message: str, directories: Sequence[Path]) -> str | None:
    """Returns what is wrong with an override; None where it names an existing group and option, or key.

    message: Hydra's, which tells a known key that the composed options do not set.
    directories: conf/ and, where it is given, --config-dir.
    """
    if key.startswith(("hydra", "-")):
        return None
    name = key.lstrip("+~")
    groups = {path.name for directory in directories for path in directory.iterdir() if path.is_dir()} - {"hydra"}
    if name in groups:
        options = {path.stem for directory in directories for path in (directory / name).glob("*.yaml")}
        return None if value in options or "," in value else unknown_key(value, options, kind="option")
    first, *path = name.split(".")
    if first not in groups and first not in TrainConfig.model_fields:
        return unknown_key(first, {*groups, *TrainConfig.model_fields})
    if first not in TrainConfig.model_fields:
        files = [file for directory in directories for file in (directory / first).glob("*.yaml")]
        known: Iterable[str] = {key for file in files for key in _top_level_keys(file)}
        return None if not path or path[0] in known else unknown_key(path[0], known)
    for index, part in enumerate(path):
        fields = fields_at([first, *path[:index]])
        if fields and part not in fields:
            return unknown_key(part, fields)
    if not key.startswith(("+", "~")) and f"'{name}'" in message:
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
    violations = [Violation(key, "???", missing_value(key)) for key in missing_keys(raw)]
    if violations:
        raise ConfigError(violations)
    return parse_config(resolved(config))


def missing_value(key: str) -> str:
    """Returns the remedy for a key without a value, with the first sentence of the key's description."""
    *parents, name = key.split(".")
    field = fields_at(parents).get(name)
    meaning = (field.description or "").split(". ")[0].rstrip(".") if field is not None else ""
    return f"It has no value. Set it{': ' + ' '.join(meaning.split()) if meaning else ''}."


def resolved(config: DictConfig) -> dict[str, Any]:
    """Returns the run's part of the configuration as plain data, with interpolations resolved.

    Raises:
        ConfigError: an interpolation names a key that does not exist, or the demo is given another model and data.
    """
    try:
        raw: Any = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError([Violation("(composition)", None, str(error).strip().replace("\n", " "))]) from error
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


def with_placeholders(config: DictConfig) -> list[str]:
    """Fills missing values in place with placeholders, for commands that need no site. Returns the keys filled."""
    raw: Any = OmegaConf.to_container(config, resolve=False)
    missing = sorted(_missing(raw))
    for key in missing:
        OmegaConf.update(config, key, PLACEHOLDERS + key)
    return missing
