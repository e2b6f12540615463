"""Import of public data sets: records of another form become prompts, one JSON object a line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from oreal_megatron.data.curation.report import Report
from oreal_megatron.data.curation.sources import read_source
from oreal_megatron.data.golds import gold_fault
from oreal_megatron.data.mapping import RecordMapping, fitting_preset, guessed_places, presets
from oreal_megatron.data.records import field_options
from oreal_megatron.files import json_line, write_parts_atomically

_FIRST = 100
"""Number of records by which the form of a data set is recognized."""


def recognized(files: Sequence[Path]) -> str:
    """Returns the name of the preset that fits most of the first records.

    Raises:
        ValueError: no preset fits any of them; the message has the keys, and the mapping that would fit.
    """
    first = [record for _, record in islice(read_source(files), _FIRST)]
    if not first:
        raise ValueError(f"{files[0]}: it has no records.")
    fitting = Counter(name for record in first if (name := fitting_preset(record)) is not None)
    if not fitting:
        raise ValueError(f"{files[0]}: no preset fits. {_what_would_fit(files[0], first[0])}")
    return fitting.most_common(1)[0][0]


def import_records(
    files: Sequence[Path], output: Path, mapping: RecordMapping, *, advance: Callable[[], None]
) -> Report:
    """Writes the records as JSONL, and returns how many were written and left out, and why.

    advance: is called after each record.

    Raises:
        ValueError: no record has a text in each place; the message has the keys and the mapping that would fit.
        OSError: the output cannot be written; an earlier file is untouched.
    """
    report = Report()
    write_parts_atomically(output, _lines(files, mapping, report, advance))
    return report


def _lines(
    files: Sequence[Path], mapping: RecordMapping, report: Report, advance: Callable[[], None]
) -> Iterator[bytes]:
    for where, record in read_source(files, _paths(mapping)):
        advance()
        prompt, fault = _mapped(record, mapping, where)
        if fault is None:
            report.counts["written"] += 1
            if (gold_is := gold_fault(prompt.get("gold_answer", "-"))) is not None:
                report.add(f"written, with a {gold_is}", where, prompt["gold_answer"])
            yield json_line(prompt)
        else:
            report.add(f"left out, {fault}", where, str(record)[:200])
    if not report.counts["written"]:
        first: Any = next((record for _, record in read_source(files)), {})
        asked = ", ".join(f"{name} = {place.path}" for name, place in mapping.places.items())
        raise ValueError(
            f"{files[0]}: none of {report.counts.total()} records has a text at each of {asked}. "
            f"{_what_would_fit(files[0], first)}"
        )


def _mapped(record: Any, mapping: RecordMapping, where: str) -> tuple[dict[str, Any], str | None]:
    """Returns the record in the form of a prompt, and the reason for which it is left out; None: it is not."""
    prompt: dict[str, Any] = {}
    for name, place in mapping.places.items():
        text = place.read(record)
        if not text or (name == "gold_answer" and text in mapping.no_answer):
            return prompt, f"no {name}"
        prompt[name] = text
    if mapping.pass_rate is not None:
        pass_rate = mapping.pass_rate.value(record)
        if pass_rate is not None:
            if not isinstance(pass_rate, int | float) or not 0 <= pass_rate <= 1:
                raise ValueError(f"{where}: pass_rate is {pass_rate!r}, not a number in [0, 1].")
            prompt["pass_rate"] = pass_rate
    if isinstance(record, Mapping):
        prompt.update({key: record[key] for key in mapping.keep if record.get(key) is not None and key not in prompt})
    return prompt, None


def _paths(mapping: RecordMapping) -> str:
    """Returns a text with the names of all columns that the mapping reads."""
    places = [*mapping.places.values(), *([] if mapping.pass_rate is None else [mapping.pass_rate])]
    return " ".join([*(place.path for place in places), *mapping.keep])


def _what_would_fit(file: Path, record: Any) -> str:
    """Returns the keys of a record, and the options of the import that would fit."""
    keys = ", ".join(map(str, record)) if isinstance(record, Mapping) else f"none, it is {type(record).__name__}"
    if (preset := fitting_preset(record)) is not None:
        remedy = f"It has the form of {presets()[preset].title}: --mapping {preset}."
    elif (places := guessed_places(record, ("question", "gold_answer"))) is not None:
        remedy = f"These would fit: oreal-data import {file} {field_options(places)} --output new.jsonl"
    else:
        remedy = "Say where the texts are: --field question=KEY --field gold_answer=KEY, with JMESPath expressions."
    return f"Keys of the first record: {keys}. {remedy}"
