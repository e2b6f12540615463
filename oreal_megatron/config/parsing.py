"""Validation of plain data as a configuration, and of a configuration against the run that it resumes."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from oreal_megatron.config.errors import ConfigError, Violation
from oreal_megatron.config.objective import FunctionsConfig
from oreal_megatron.config.sections import TrainConfig
from oreal_megatron.config.speculation_checks import CHECKS

S = TypeVar("S", bound=BaseModel)


def parse_config(raw: Mapping[str, Any]) -> TrainConfig:
    """Validates a composed configuration.

    Raises:
        ConfigError: with all violations: of every section's schema, and of the checks across sections whose sections
            are valid.
    """
    sections, violations = parse_sections(raw, TrainConfig.model_fields)
    violations = [*_unwritable(raw), *violations]
    for name in raw.keys() - TrainConfig.model_fields.keys():
        violations.append(Violation(name, raw[name], unknown_key(name, TrainConfig.model_fields)))
    for reads, check in CHECKS:
        if all(name in sections for name in reads):
            violations += check(*(sections[name] for name in reads))
    if violations:
        are_valid = sections.keys() == TrainConfig.model_fields.keys() == raw.keys()
        raise ConfigError(violations, TrainConfig(**sections) if are_valid else None)
    return TrainConfig(**sections)


def parse_sections(raw: Mapping[str, Any], names: Iterable[str]) -> tuple[dict[str, Any], list[Violation]]:
    """Validates sections by themselves. Returns those that are valid by name, and the violations of the others."""
    sections: dict[str, Any] = {}
    violations: list[Violation] = []
    for name in names:
        if name not in raw:
            violations.append(Violation(name, None, f"The section is missing. Choose an option of the group {name}."))
            continue
        annotation = TrainConfig.model_fields[name].annotation
        try:
            adapter: TypeAdapter[Any] = TypeAdapter(annotation)  # type: ignore[arg-type]
            sections[name] = adapter.validate_python(raw[name])
        except ValidationError as error:
            violations += [_from_pydantic(name, raw[name], annotation, item) for item in error.errors()]
    return sections, violations


def parse_section(name: str, raw: Any, section: type[S]) -> S:
    """Validates one section by itself. name: its key or file, for messages.

    Raises:
        ConfigError: with all violations.
    """
    try:
        return section.model_validate(raw)
    except ValidationError as error:
        raise ConfigError([_from_pydantic(name, raw, section, item) for item in error.errors()]) from error


def _unwritable(value: Any, key: str = "") -> Iterator[Violation]:
    """Yields every text, also those in lists and mappings, that no UTF-8 file or path can hold."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _unwritable(name, f"{key}.{name!a}")
            yield from _unwritable(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _unwritable(inner, f"{key}.{index}")
    elif isinstance(value, str) and ("\0" in value or any("\ud800" <= character <= "\udfff" for character in value)):
        yield Violation(key, value, "It has a zero byte, or bytes that are not UTF-8. Set it to a text of Unicode.")


# Keys that may change when a run resumes: length, speed and visibility of the run, not what it computes.
_MAY_CHANGE = (
    "run.dir",  # the directory may have been moved
    "run.num_steps",
    "optimizer.policy.decay_steps",  # null means all updates of run.num_steps
    "optimizer.reward_model.decay_steps",
    "run.checkpoint_every",
    "run.keep_checkpoints",
    "run.export",
    "run.async_checkpoints",
    "run.threads",
    "tracking.",
    "parallel.",
    "rollout.sglang.",
    "rollout.schedule",  # what was trained so far stays; rollouts that are too old are generated again
    "rollout.max_staleness",
    "rollout.in_flight",
    "rollout.mismatch",  # limits, which may be null
    "rollout.undecided",
    "evaluation.servers",  # an evaluation that is under way is ended with any number of them
    "resources.",
)

# Keys that came after version 0.1.0, with the value by which that version worked.
ADDED: dict[str, Any] = {
    "objective.optimizer": "standard",
    "objective.train_head_bias": True,
    "objective.token_weights.form": "confidence",
    "objective.token_weights.normalize": "none",
    "objective.token_weights.floor": 0.0,
    **{f"objective.functions.{name}": None for name in FunctionsConfig.model_fields},
    "objective.normalize_advantages": "none",
    "objective.importance_token_band": None,
    "objective.importance_response_band": None,
    "objective.reward_model.responses": "trained",
    "objective.reward_model.updates": 1,
    "objective.reward_model.ranking_weight": 0.0,
    "objective.updates.epochs": 1,
    "objective.updates.minibatches": 1,
    "data.arithmetic.wrong_order_share": 0.0,
    "optimizer.policy.decay": "cosine",
    "optimizer.reward_model.decay": "cosine",
    "sft.optimizer.decay": "cosine",
    "sft.epochs": None,
    "sft.sources": None,
    "sft.heldout": None,
    "sft.turns": "assistant",
    "sft.overlong": "refuse",
    "rollout.reward": None,
    "rollout.schedule": "in_turn",
    "rollout.max_staleness": None,
    "rollout.in_flight": "recompute",
    "prompt.date": None,
    "rollout.generation": None,
    "rollout.sampling.function": None,
    "prompt.function": None,
    "evaluation.functions": {},
    "evaluation.servers": 0,
}

# Further keys that may change when fine-tuning resumes; of a warm start they made the initial policy.
_MAY_CHANGE_IN_SFT = (
    "sft.steps",
    "sft.epochs",
    "sft.optimizer.decay_steps",
    # After an update that was refused, the run has to be able to go on.
    "sft.optimizer.lr",
    "sft.optimizer.min_lr",
    "sft.optimizer.clip_grad",
)


def check_resume(saved: Mapping[str, Any], config: TrainConfig, place: str) -> None:
    """Refuses to go on with the state of a run that was configured otherwise.

    saved: the earlier configuration as plain data, read from `place`.

    Raises:
        ConfigError: with every key that differs and may not.
    """
    may_change = _MAY_CHANGE + (_MAY_CHANGE_IN_SFT if config.is_sft else ())
    before = {key: value for key, value in _flat(saved).items() if not key.startswith(may_change)}
    now = {key: value for key, value in settings_of(config).items() if not key.startswith(may_change)}
    check_settings(before, now, place)


def check_settings(before: Mapping[str, Any], now: Mapping[str, Any], place: str) -> None:
    """Raises ConfigError with every key whose values differ; `before` was read from `place`."""
    before = {key: value for key, value in ADDED.items() if key in now} | dict(before)
    violations = [
        Violation(key, now.get(key), f"{place} was made with {before.get(key)!r}. Set that, or name another run.dir.")
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    if violations:
        raise ConfigError(violations)


def settings_of(config: TrainConfig) -> dict[str, Any]:
    """Returns every key of the configuration with its value as JSON has it: {"run.seed": 0, ...}."""
    return _flat(config.model_dump(mode="json"))


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping) or not value:
        return {path: value}
    return {
        key: item
        for name, inner in value.items()
        for key, item in _flat(inner, f"{path}.{name}" if path else str(name)).items()
    }


def _from_pydantic(section: str, raw: Any, annotation: Any, error: Any) -> Violation:
    path = [part for part in error["loc"] if not (isinstance(part, str) and part.endswith("Config"))]
    key = ".".join([section, *map(str, path)])
    value = None if error["type"] == "missing" else error["input"]
    if error["type"] == "extra_forbidden":
        return Violation(key, value, unknown_key(str(path[-1]), fields_at(path[:-1], annotation)))
    if error["type"] == "missing":
        return Violation(key, value, "The key is missing. Set it, to null where it does not apply.")
    return Violation(key, value, f"{error['msg'].removeprefix('Value error, ').rstrip('.')}.")


def fields_at(path: Sequence[Any], annotation: Any = TrainConfig) -> Mapping[str, Any]:
    """Returns the fields of the section that `path` leads to from `annotation`; empty where it leads to no section."""
    if typing.get_origin(annotation) is Mapping:
        return fields_at(path[1:], typing.get_args(annotation)[1]) if path else {}
    model = next((c for c in kinds_of(annotation) if isinstance(c, type) and issubclass(c, BaseModel)), None)
    if model is None:
        return {}
    if not path:
        return model.model_fields
    info = model.model_fields.get(str(path[0]))
    return fields_at(path[1:], info.annotation) if info else {}


def kinds_of(annotation: Any) -> Iterator[Any]:
    """Yields what an annotation is, and what it is made of where it is a union or has metadata, outermost first."""
    yield annotation
    if typing.get_origin(annotation) in (typing.Annotated, typing.Union, types.UnionType):
        for inner in typing.get_args(annotation):
            yield from kinds_of(inner)


def unknown_key(name: str, known: Iterable[str], *, kind: str = "key") -> str:
    """Returns the remedy for a key that does not exist: the nearest of the known keys, or all of them.

    kind: what the name stands for: `key`, or `option` of a group.
    """
    known = sorted(known)
    if close := difflib.get_close_matches(name, known, n=1):
        return f"There is no such {kind}. Did you mean `{close[0]}`?"
    return f"There is no such {kind}. Known {kind}s: {', '.join(known)}." if known else f"There is no such {kind}."
