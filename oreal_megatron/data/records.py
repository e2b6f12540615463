"""Records of a JSONL file, and words for files and lines that are something else."""

from __future__ import annotations

import codecs
import json
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from oreal_megatron.data.mapping import fitting_preset, guessed_places, presets

# First bytes of files of other formats -> what the file is, and the command that makes JSONL of it.
_OTHER_FORMATS = {
    b"PAR1": ("a Parquet file", "oreal-data import {path} --output {stem}.new.jsonl"),
    b"ARROW1": ("an Arrow file", "oreal-data import {path} --output {stem}.new.jsonl"),
    b"\x1f\x8b": ("compressed with gzip", "gunzip --keep {path}"),
    b"\x28\xb5\x2f\xfd": ("compressed with zstd", "zstd --decompress {path}"),
    b"\xff\xfe": ("UTF-16 text", "iconv --from-code UTF-16 --to-code UTF-8 {path} > {stem}.utf8.jsonl"),
    b"\xfe\xff": ("UTF-16 text", "iconv --from-code UTF-16 --to-code UTF-8 {path} > {stem}.utf8.jsonl"),
}
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def read_records(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number, object) of a JSONL file, which may begin with a byte order mark; empty lines are left out.

    Raises:
        ValueError: it is no such file; the message says what it is instead, and the command that makes JSONL of it.
    """
    for number, value in read_json_lines(path):
        if not isinstance(value, dict):
            if isinstance(value, list) and number == 1 and _num_lines(path) == 1:
                raise ValueError(_array(path))
            raise ValueError(f"{path}:{number}: a JSON object is expected, not {type(value).__name__}")
        yield number, value


def read_json_lines(path: str | Path) -> Iterator[tuple[int, Any]]:
    """Yields (line number, value) of a file with a JSON value on every line. Raises ValueError as `read_records`."""
    path = Path(path)
    _check_format(path)
    is_first = True
    with path.open("rb") as file:
        for number, content in enumerate(file, start=1):
            line = _decoded(content.removeprefix(codecs.BOM_UTF8) if number == 1 else content, f"{path}:{number}")
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                if is_first and (whole := _spread_over_lines(path, line)) is not None:
                    raise ValueError(whole) from error
                raise ValueError(f"{path}:{number}: not JSON: {error}. Every line must be a JSON object.") from error
            if "\\u" in line and _LONE_SURROGATE.search(json.dumps(value, ensure_ascii=False)):
                raise ValueError(
                    f"{path}:{number}: it has half of a surrogate pair (\\ud800 to \\udfff), which is no text. "
                    "Remove it."
                )
            yield number, value
            is_first = False


def text_at(record: Mapping[str, Any], key: str, where: str, *, wanted: tuple[str, ...]) -> str:
    """Returns the text or number of a record's key as text; it may be empty.

    where: file and line, for messages. wanted: all keys that the file must have.

    Raises:
        ValueError: the key is missing or no text; the message names the keys that are there, and the command that
            gives them the wanted names where they are known.
    """
    value = record.get(key)
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if isinstance(value, str):
        return value
    problem = f"`{key}` is {_shown(value)}, a text is expected" if key in record else f"`{key}` is missing"
    raise ValueError(
        f"{where}: {problem}. Keys of the line: {', '.join(map(str, record)) or 'none'}. {_renaming(record, wanted)}"
    )


def _check_format(path: Path) -> None:
    """Raises ValueError where the path is a directory, cannot be read, or is of another format than text."""
    quoted = shlex.quote(str(path))
    if path.is_dir():
        raise ValueError(
            f"{path} is a directory. Name a JSONL file. A data set in a directory becomes one by: "
            f"oreal-data import {quoted} --output {shlex.quote(path.resolve().name + '.jsonl')}"
        )
    try:
        with path.open("rb") as file:
            first = file.read(8)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    for start, (kind, command) in _OTHER_FORMATS.items():
        if first.startswith(start):
            stem = shlex.quote(str(path.with_suffix("")))
            raise ValueError(
                f"{path} is {kind}, and a JSONL file is expected. Convert it: {command.format(path=quoted, stem=stem)}"
            )


def _decoded(line: bytes, where: str) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        path = where.rpartition(":")[0]
        raise ValueError(
            f"{where}: the line is not UTF-8. Convert the file, from Latin-1 for example: "
            f"iconv --from-code ISO-8859-1 --to-code UTF-8 '{path}' > '{Path(path).with_suffix('')}.utf8.jsonl'"
        ) from error


def _num_lines(path: str | Path) -> int:
    """Returns the number of lines that are not empty, 2 at most."""
    with Path(path).open("rb") as file:
        full = (line for line in file if line.strip())
        return sum(1 for _ in zip(range(2), full, strict=False))


def _spread_over_lines(path: Path, first_line: str) -> str | None:
    """Returns what is wrong with a file whose JSON goes over several lines; None where it is no JSON."""
    try:
        whole = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError):
        # Several indented objects, one after the other.
        return _indented(path) if first_line.strip() == "{" else None
    return _array(path) if isinstance(whole, list) else _indented(path)


def _array(path: str | Path) -> str:
    stem = shlex.quote(f"{Path(path).with_suffix('')}.new.jsonl")
    return (
        f"{path} is one JSON array. Every line must be an object. Convert it: "
        f"oreal-data import {shlex.quote(str(path))} --output {stem}"
    )


def _indented(path: str | Path) -> str:
    return (
        f"{path} has JSON that goes over several lines. Every line must be an object: "
        f"jq --compact-output '.' '{path}' > new.jsonl"
    )


def _renaming(record: Mapping[str, Any], wanted: tuple[str, ...]) -> str:
    """Returns the command that gives the record's keys the wanted names, as far as these are known by others."""
    if "gold_answer" in wanted and (preset := fitting_preset(record)) is not None:
        title = presets()[preset].title
        return f"This is the form of {title}: oreal-data import FILE --mapping {preset} --output new.jsonl"
    places = guessed_places(record, wanted)
    if places is None:
        return f"Name its keys {' and '.join(wanted)}."
    return f"These fit: oreal-data import FILE {field_options(places)} --output new.jsonl"


def field_options(places: Mapping[str, str]) -> str:
    """Returns the options of `oreal-data import` for these JMESPath expressions by key."""
    return " ".join(f"--field {shlex.quote(f'{key}={place}')}" for key, place in places.items())


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."
