"""Records of a JSONL file, and words for files and lines that are something else."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# First bytes of files of other formats -> what the file is, and the command that makes JSONL of it.
_OTHER_FORMATS = {
    b"PAR1": (
        "a Parquet file",
        'python -c "import pandas; '
        "pandas.read_parquet('{path}').to_json('{stem}.jsonl', orient='records', lines=True)\"",
    ),
    b"\x1f\x8b": ("compressed with gzip", "gunzip --keep '{path}'"),
    b"\x28\xb5\x2f\xfd": ("compressed with zstd", "zstd --decompress '{path}'"),
    b"\xff\xfe": ("UTF-16 text", "iconv --from-code UTF-16 --to-code UTF-8 '{path}' > '{stem}.utf8.jsonl'"),
    b"\xfe\xff": ("UTF-16 text", "iconv --from-code UTF-16 --to-code UTF-8 '{path}' > '{stem}.utf8.jsonl'"),
}
# Names under which public data sets have the text of a key, the usual first. Text before #### is GSM8K's working.
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
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def read_records(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number, object) of a JSONL file, which may begin with a byte order mark; empty lines are left out.

    Raises:
        ValueError: it is no such file; the message says what it is instead, and the command that makes JSONL of it.
    """
    lines = _text_of(Path(path)).split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            if (whole := _spread_over_lines(path, lines)) is not None:
                raise ValueError(whole) from error
            raise ValueError(f"{path}:{number}: not JSON: {error}. Every line must be a JSON object.") from error
        if isinstance(record, list) and len(lines) <= 2:
            raise ValueError(_array(path))
        if not isinstance(record, dict):
            raise ValueError(f"{path}:{number}: a JSON object is expected, not {type(record).__name__}")
        if "\\u" in line and _LONE_SURROGATE.search(json.dumps(record, ensure_ascii=False)):
            raise ValueError(
                f"{path}:{number}: it has half of a surrogate pair (\\ud800 to \\udfff), which is no text. Remove it."
            )
        yield number, record


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


def _text_of(path: Path) -> str:
    if path.is_dir():
        raise ValueError(
            f"{path} is a directory. Name a JSONL file. A data set that was saved by `datasets` becomes one by: "
            f"python -c \"from datasets import load_from_disk; load_from_disk('{path}').to_json('{path.name}.jsonl')\""
        )
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    for start, (kind, command) in _OTHER_FORMATS.items():
        if content.startswith(start):
            raise ValueError(
                f"{path} is {kind}, and a JSONL file is expected. Convert it: "
                f"{command.format(path=path, stem=path.with_suffix(''))}"
            )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}:{number}: the line is not UTF-8. Convert the file, from Latin-1 for example: "
            f"iconv --from-code ISO-8859-1 --to-code UTF-8 '{path}' > '{path.with_suffix('')}.utf8.jsonl'"
        ) from error


def _spread_over_lines(path: str | Path, lines: list[str]) -> str | None:
    """Returns what is wrong with a file whose JSON goes over several lines; None where it is no JSON."""
    try:
        whole = json.loads("\n".join(lines))
    except (json.JSONDecodeError, RecursionError):
        # Several indented objects, one after the other.
        return _indented(path, ".") if lines[0].strip() == "{" else None
    return _array(path) if isinstance(whole, list) else _indented(path, ".")


def _array(path: str | Path) -> str:
    return f"{path} is one JSON array. Every line must be an object: jq --compact-output '.[]' '{path}' > new.jsonl"


def _indented(path: str | Path, program: str) -> str:
    return (
        f"{path} has JSON that goes over several lines. Every line must be an object: "
        f"jq --compact-output '{program}' '{path}' > new.jsonl"
    )


def _renaming(record: Mapping[str, Any], wanted: tuple[str, ...]) -> str:
    """Returns the jq command that gives the record's keys the wanted names, as far as these are known by others."""
    found = {key: _place_of(record, _OTHER_NAMES[key]) for key in wanted}
    if any(place is None for place in found.values()):
        return f"Name its keys {' and '.join(wanted)}."
    program = ", ".join(f"{key}: {place}" for key, place in found.items())
    return f"These fit: jq --compact-output '{{{program}}}' FILE > new.jsonl"


def _place_of(value: Any, names: tuple[str, ...], at: str = "") -> str | None:
    """Returns the jq expression of the text with one of the names, in the value or within its mappings and lists."""
    if isinstance(value, list):
        return next((place for i, item in enumerate(value) if (place := _place_of(item, names, f"{at}[{i}]"))), None)
    if not isinstance(value, Mapping):
        return None
    for name in names:
        inner = value.get(name)
        if isinstance(inner, str | int | float) and not isinstance(inner, bool) and str(inner).strip():
            place = f"{at}.{name}"
            return f'({place} | split("#### ") | last)' if "#### " in str(inner) else place
    places = (_place_of(inner, names, f"{at}.{name}") for name, inner in value.items() if str(name).isidentifier())
    return next((place for place in places if place), None)


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."
