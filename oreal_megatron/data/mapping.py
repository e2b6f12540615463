"""Mappings: where a record of another data set has the question and the gold answer. docs/data.md has examples."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import jmespath
import yaml
from jmespath.exceptions import JMESPathError, JMESPathTypeError
from pydantic import field_validator

from oreal_megatron.config import AsPath, Section, Strings, parse_section
from oreal_megatron.verifier.extract import gold_value

PRESETS = Path(__file__).parent / "mappings"
"""Directory of the mappings of public data sets."""
# Names under which public data sets have the text of a key, the usual first.
_OTHER_NAMES = {
    "question": ("question", "problem", "prompt", "query", "input", "instruction", "content"),
    "gold_answer": (
        "gold_answer",
        "ground_truth",
        "final_answer",
        "expected_answer",
        "target",
        "gold",
        "answer",
        "label",
        "solution",
    ),
    "response": ("response", "solution", "output", "completion", "generation", "content"),
}


class Source(Section):
    """Place of a text within a record."""

    path: str
    """JMESPath expression, such as `problem` or `reward_model.ground_truth`."""
    final_answer: bool = False
    """Whether the text is a solution, of which the text after #### or the last box is taken."""
    prefix: str = ""
    """Text before the question that is removed, such as an instruction."""
    suffix: str = ""
    """Text after the question that is removed."""

    @field_validator("path")
    @classmethod
    def _is_expression(cls, path: str) -> str:
        expression(path)
        return path

    def value(self, record: Any) -> Any:
        """Returns what is at the place, of any type; None where there is nothing that the expression takes."""
        try:
            return expression(self.path).search(record)
        except JMESPathTypeError:
            return None

    def read(self, record: Any) -> str | None:
        """Returns the text or number at the place as text, without spaces around it; None where there is none."""
        value = self.value(record)
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            return None
        text = str(value).strip()
        if self.final_answer:
            answer = gold_value(text)
            return answer if answer != text else None
        return text.removeprefix(self.prefix).removesuffix(self.suffix).strip()


Place = Annotated[Source, AsPath]


class RecordMapping(Section):
    """Places of the parts of a prompt or demonstration within a record of a data set."""

    title: str = ""
    """Name of the data set."""
    recognized_by: Strings = ()
    """Keys that every record of the data set has."""
    question: Place
    """Place of the question."""
    gold_answer: Place | None = None
    """Place of the correct answer. null: the records are demonstrations, with a response."""
    response: Place | None = None
    """Place of a worked response, for demonstrations."""
    pass_rate: Place | None = None
    """Place of the share of correct responses, in [0, 1]. null, or nothing there: none."""
    no_answer: Strings = ()
    """Texts in the place of an answer that stand for none. Their records are left out."""
    keep: Strings = ()
    """Keys of a record that are copied as they are."""

    @property
    def places(self) -> dict[str, Source]:
        """The places of the texts that a record must have, by the name of the key that is written."""
        texts = {"question": self.question, "gold_answer": self.gold_answer, "response": self.response}
        return {name: place for name, place in texts.items() if place is not None}

    def fits(self, record: Any) -> bool:
        """Whether the record has the keys of the data set, and a text in each place."""
        keys = record if isinstance(record, Mapping) else {}
        return all(key in keys for key in self.recognized_by) and all(
            place.read(record) for place in self.places.values()
        )


def load_mapping(name_or_file: str) -> RecordMapping:
    """Loads the mapping of a public data set by its name, or of a YAML file.

    Raises:
        ValueError: there is no such preset or file, or it is no mapping; the message names the key and the presets.
    """
    names = sorted(path.stem for path in PRESETS.glob("*.yaml"))
    path = PRESETS / f"{name_or_file}.yaml" if name_or_file in names else Path(name_or_file)
    if not path.is_file():
        raise ValueError(
            f"--mapping {name_or_file}: neither a file nor one of the presets {', '.join(names)}. Name one of them."
        )
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: it is not YAML: {error}") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{path}: a mapping is expected, with the keys {', '.join(RecordMapping.model_fields)}.")
    return validated_mapping(loaded, str(path))


def validated_mapping(fields: Mapping[str, Any], where: str) -> RecordMapping:
    """Returns the mapping with these fields. where: their origin, for messages.

    Raises:
        ValueError: a field is unknown or no expression, or neither gold_answer nor response is given.
    """
    mapping = parse_section(where, dict(fields), RecordMapping)
    if mapping.gold_answer is None and mapping.response is None:
        raise ValueError(f"{where}: neither gold_answer nor response has a place. Set gold_answer to where it stands.")
    return mapping


@functools.cache
def presets() -> dict[str, RecordMapping]:
    """Returns the mappings of public data sets by name."""
    return {path.stem: load_mapping(path.stem) for path in sorted(PRESETS.glob("*.yaml"))}


def fitting_preset(record: Any) -> str | None:
    """Returns the name of the preset that fits the record and names the most of its keys; None where none fits."""
    fitting = [name for name, mapping in presets().items() if mapping.fits(record)]
    return max(fitting, key=lambda name: len(presets()[name].recognized_by), default=None)


def guessed_places(record: Any, wanted: tuple[str, ...]) -> dict[str, str] | None:
    """Returns JMESPath expressions of the wanted keys by the names that data sets use; None where one is not found."""
    found = {key: _place_of(record, _OTHER_NAMES[key]) for key in wanted}
    return None if None in found.values() else {key: str(place) for key, place in found.items()}


def _place_of(value: Any, names: tuple[str, ...], at: str = "") -> str | None:
    """Returns the expression of the text with one of the names, in the value or within its mappings and lists."""
    if isinstance(value, list):
        return next((place for i, item in enumerate(value) if (place := _place_of(item, names, f"{at}[{i}]"))), None)
    if not isinstance(value, Mapping):
        return None
    for name in names:
        inner = value.get(name)
        if isinstance(inner, str | int | float) and not isinstance(inner, bool) and str(inner).strip():
            return f"{at}.{name}".removeprefix(".")
    places = (
        _place_of(inner, names, f"{at}.{name}".removeprefix("."))
        for name, inner in value.items()
        if str(name).isidentifier()
    )
    return next((place for place in places if place), None)


@functools.cache
def expression(path: str) -> Any:
    """Returns the compiled JMESPath expression. Raises ValueError where it is none."""
    try:
        return jmespath.compile(path)
    except JMESPathError as error:
        raise ValueError(f"{path!r} is no JMESPath expression: {' '.join(str(error).split())}") from error
