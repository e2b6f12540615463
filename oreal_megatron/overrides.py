"""Overrides of the command line: what is wrong with one, and what its user meant. Imports no torch."""

from __future__ import annotations

import os
import re
import shlex
import sys
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import HydraException

from oreal_megatron.config import ConfigError, TrainConfig, Violation, fields_at, kinds_of, unknown_key


def config_directory() -> Path:
    """Returns conf/ of the checkout, or of the installed wheel where there is no checkout; in a SLURM job, its copy."""
    if "OREAL_CONF" in os.environ:
        return Path(os.environ["OREAL_CONF"])
    checkout = Path(__file__).resolve().parent.parent / "conf"
    return checkout if checkout.is_dir() else Path(sys.prefix) / "share" / "oreal_megatron" / "conf"


def search_path(config_dir: Path) -> str:
    """Returns the override that adds a directory with options of groups. Raises ConfigError if it does not exist."""
    if not config_dir.is_dir():
        remedy = "There is no such directory. Name one with folders such as objective/ or experiment/."
        raise ConfigError([Violation("--config-dir", str(config_dir), remedy)])
    return f"hydra.searchpath=[{literal(f'file://{config_dir.resolve()}')}]"


def literal(text: str) -> str:
    """Returns the value of an override that Hydra reads as exactly this text: quoted, and without interpolations."""
    return _quoted(re.sub(r"(\\*)\$\{", r"\1\1\\${", text))


def check_overrides(overrides: Sequence[str], config_dir: Path | None = None) -> None:
    """Raises ConfigError with every override that Hydra cannot read, or that names an unknown key, group or option."""
    violations = [v for override in overrides if (v := _violation(override, overrides, config_dir, "")) is not None]
    if violations:
        raise ConfigError(violations)


def composition_error(error: Exception, overrides: Sequence[str], config_dir: Path | None = None) -> ConfigError:
    """Returns the error with the overrides that Hydra's message is about, or with the message alone."""
    message = " ".join(str(error).split())
    violations = [
        v for override in overrides if (v := _violation(override, overrides, config_dir, message)) is not None
    ]
    return ConfigError(violations or [Violation("(composition)", None, message.rstrip(".") + ".")])


def _violation(override: str, overrides: Sequence[str], config_dir: Path | None, message: str) -> Violation | None:
    """Returns what is wrong with an override. message: Hydra's, if it has tried to compose; otherwise empty."""
    key, _, value = override.partition("=")
    parsed = _parsed(override)
    if parsed is None:
        return Violation(key, value, _unreadable(override))
    if any(other.startswith("hydra.searchpath") for other in overrides):
        return None  # its directories may have groups and options of any name
    directories = [config_directory(), *([config_dir] if config_dir is not None else [])]
    remedy = _remedy(parsed, value, directories, message)
    return None if remedy is None else Violation(key, value, remedy)


def _parsed(override: str) -> Override | None:
    """Returns the override as Hydra reads it; None where it does not."""
    try:
        return OverridesParser.create().parse_override(override)
    except (HydraException, ValueError):  # ValueError: a number of thousands of digits
        return None


def _unreadable(override: str) -> str:
    """Returns the remedy for an override that is not in Hydra's grammar."""
    key, equals, value = override.partition("=")
    if not equals:
        return f"It is no override. Write {ascii(key)[1:-1]}=VALUE."
    quoted = f"{key}={_quoted(value)}"
    if _parsed(quoted) is not None and quoted.isprintable():
        return f"The value has characters that need quotes, inside of the shell's. Write {shlex.quote(quoted)}."
    return "It has characters that the command line cannot have. Set the key in a file below --config-dir."


def _quoted(value: str) -> str:
    """Returns a text as a quoted value of Hydra's grammar, in which a backslash escapes before a quote alone."""
    return '"' + re.sub(r'(\\*)"', r"\1\1\"", re.sub(r"(\\+)$", r"\1\1", value)) + '"'


def _remedy(override: Override, value: str, directories: Sequence[Path], message: str) -> str | None:
    """Returns what is wrong with an override; None where it names an existing group and option, or key.

    value: as it was written. directories: conf/ and, where it is given, --config-dir. message: see `_violation`.
    """
    name = override.key_or_group
    if name.startswith("hydra"):
        return None
    if not name:
        return "There is no key. Write KEY=VALUE."
    groups = {path.name for directory in directories for path in directory.iterdir() if path.is_dir()} - {"hydra"}
    if name in groups:
        return _option_remedy(override, name, directories)
    first, *path = name.split(".")
    if override.is_add() and not message:
        # Keys that are added are composed, so that the schema names the unknown ones together with all else.
        return None
    if first not in groups and first not in TrainConfig.model_fields:
        return unknown_key(first, {*groups, *TrainConfig.model_fields})
    if first not in TrainConfig.model_fields:
        files = [file for directory in directories for file in (directory / first).glob("*.yaml")]
        known = {key for file in files for key in _top_level_keys(file)}
        return None if not path or path[0] in known else unknown_key(path[0], known)
    for index, part in enumerate(path):
        above = [first, *path[:index]]
        fields = fields_at(above)
        if fields and part not in fields:
            return unknown_key(part, fields)
        if not fields and _is_value(above):
            return f"{'.'.join(above)} has no keys below it. Set it as a whole."
    if f"'{name}'" in message and not override.is_add() and not override.is_delete():
        written = value if value.isprintable() else "VALUE"
        return f"The chosen options do not set this key. Choose an option that does, or write +{name}={written}."
    return None


def _option_remedy(override: Override, group: str, directories: Sequence[Path]) -> str | None:
    """Returns what is wrong with the value of a group; None for names of its options and lists of these."""
    if override.is_delete():
        return None
    if override.value_type in (ValueType.CHOICE_SWEEP, ValueType.SIMPLE_CHOICE_SWEEP):
        names: list[Any] = list(override.sweep_string_iterator())
    elif override.is_sweep_override():
        return None
    else:
        value = override.value()
        names = value if isinstance(value, list) else [value]
    options = {path.stem for directory in directories for path in (directory / group).glob("*.yaml")}
    for name in names:
        if not isinstance(name, str) or name not in options:
            return unknown_key("null" if name is None else str(name), options, kind="option")
    return None


def _is_value(path: Sequence[str]) -> bool:
    """Returns whether a path leads to a key of the schema that holds a value, not a section or a mapping."""
    field = fields_at(path[:-1]).get(path[-1])
    if field is None or fields_at(path):
        return False
    return not any(typing.get_origin(kind) is Mapping for kind in kinds_of(field.annotation))


def _top_level_keys(file: Path) -> Iterable[str]:
    try:
        return (yaml.safe_load(file.read_text()) or {}).keys()
    except (yaml.YAMLError, ValueError, AttributeError):  # Hydra names the file
        return ()
