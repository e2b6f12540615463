"""Files of a data set as public hubs have them: JSONL, JSON arrays, Parquet and Arrow files, directories of these."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import orjson
import pyarrow
import pyarrow.parquet

from oreal_megatron.data.records import read_json_lines

_BATCH = 1024
_SUFFIXES = (".parquet", ".arrow", ".jsonl", ".json")
# Names of files and directories that hold a split: train-00000-of-00010.parquet, test/algebra.jsonl
_SPLIT = re.compile(r"(?<![a-z])(train|test|validation|valid|dev|eval)(?![a-z])")


def find_files(path: Path, split: str | None) -> list[Path]:
    """Returns the data files of a file or directory, in order.

    A directory is what `datasets` saved (`save_to_disk`), or a copy of a repository of a hub.

    split: name of the split, for a directory with several; None: `train` if there is one.

    Raises:
        ValueError: there are no such files, or those of several data sets; the message names them.
    """
    if path.is_file():
        if split is not None:
            raise ValueError(f"{path}: it is one file, and has no split {split!r}. Leave the split out.")
        return [path]
    if not path.is_dir():
        raise ValueError(f"{path}: neither a file nor a directory. Name a file or the directory of a data set.")
    if (path / "dataset_dict.json").is_file():
        return find_files(path / _chosen(path, _listed(path / "dataset_dict.json", "splits"), split), None)
    if (path / "state.json").is_file():
        return [path / file["filename"] for file in _listed(path / "state.json", "_data_files")]
    for suffix in _SUFFIXES:
        found = sorted(file for file in path.rglob(f"*{suffix}") if not _is_hidden(file.relative_to(path)))
        if suffix == ".json":
            found = [file for file in found if file.name not in ("dataset_infos.json", "dataset_info.json")]
        if found:
            return _of_one_data_set(path, found, split)
    raise ValueError(f"{path}: no {', '.join(_SUFFIXES)} files in it. Name a file or the directory of a data set.")


def num_records(files: Sequence[Path]) -> int:
    """Returns the number of records, for a progress bar; for JSONL that of lines."""
    return sum(_num_records(file) for file in files)


def read_source(files: Sequence[Path], wanted: str | None = None) -> Iterator[tuple[str, Any]]:
    """Yields (file and record number from 1, record), one batch after the other; a .json file is read whole.

    wanted: text with the names of the columns that are read from Parquet and Arrow files; None: all.

    Raises:
        ValueError: a file cannot be read; the message names it.
    """
    for file in files:
        for number, record in _read_file(file, wanted):
            yield f"{file}:{number}", record


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _listed(file: Path, key: str) -> list[Any]:
    """Returns the list at a key of a file that `datasets` wrote. Raises ValueError where it is not there."""
    try:
        return list(json.loads(file.read_bytes())[key])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file}: it has no list {key!r}, as `datasets` writes it. Save the data set again."
        ) from error


def _chosen(path: Path, names: Sequence[str], split: str | None) -> str:
    """Returns the split that was asked for, or `train`, or the only split."""
    name = split or ("train" if "train" in names else names[0] if len(names) == 1 else None)
    if name not in names:
        raise ValueError(
            f"{path}: its splits are {', '.join(names)}. Choose one with --split NAME of oreal-data import, or name "
            "its files."
        )
    return str(name)


def _of_one_data_set(path: Path, files: Sequence[Path], split: str | None) -> list[Path]:
    """Returns the files of the split; refuses files in several directories, which are different data sets."""
    by_split: dict[str, list[Path]] = {}
    for file in files:
        match = _SPLIT.search(file.relative_to(path).as_posix())
        by_split.setdefault(match[1] if match else file.stem, []).append(file)
    are_splits = any(_SPLIT.fullmatch(name) for name in by_split)
    chosen = by_split[_chosen(path, sorted(by_split), split)] if are_splits else list(files)
    directories = sorted({str(file.parent) for file in chosen})
    if len(directories) > 1:
        raise ValueError(f"{path}: it has several data sets. Name those that you want: {', '.join(directories)}.")
    return chosen


def _kind(file: Path) -> str:
    """Returns parquet, arrow, whole (JSON that may go over several lines) or lines, by the file's first bytes."""
    try:
        with file.open("rb") as opened:
            first = opened.read(64)
    except OSError as error:
        raise ValueError(f"{file}: cannot be read: {error}") from error
    if first.startswith(b"PAR1"):
        return "parquet"
    if first.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        return "arrow"
    is_array = first.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    return "whole" if is_array or file.suffix == ".json" else "lines"


def _num_records(file: Path) -> int:
    kind = _kind(file)
    try:
        if kind == "parquet":
            return int(pyarrow.parquet.ParquetFile(file).metadata.num_rows)
        if kind == "arrow":
            return sum(batch.num_rows for batch in _arrow_batches(file))
    except pyarrow.ArrowException as error:
        raise ValueError(f"{file}: cannot be read: {error}") from error
    with file.open("rb") as opened:
        return sum(block.count(b"\n") for block in iter(lambda: opened.read(1 << 20), b""))


def _read_file(file: Path, wanted: str | None) -> Iterator[tuple[int, Any]]:
    kind = _kind(file)
    if kind == "whole":
        try:
            value = orjson.loads(file.read_bytes().removeprefix(b"\xef\xbb\xbf"))
        except orjson.JSONDecodeError:  # a list or an object on every line
            yield from read_json_lines(file)
            return
        yield from enumerate(value if isinstance(value, list) else [value], start=1)
    elif kind == "lines":
        yield from read_json_lines(file)
    else:
        number = 0
        try:
            for batch in _parquet_batches(file, wanted) if kind == "parquet" else _arrow_batches(file, wanted):
                for record in batch.to_pylist():
                    number += 1
                    yield number, record
        except pyarrow.ArrowException as error:
            raise ValueError(f"{file}: cannot be read: {error}") from error


def _parquet_batches(file: Path, wanted: str | None) -> Iterator[Any]:
    opened = pyarrow.parquet.ParquetFile(file)
    yield from opened.iter_batches(batch_size=_BATCH, columns=_columns(opened.schema_arrow.names, wanted))


def _arrow_batches(file: Path, wanted: str | None = None) -> Iterator[Any]:
    with pyarrow.memory_map(str(file)) as mapped:
        is_stream = mapped.read(4) == b"\xff\xff\xff\xff"
        mapped.seek(0)
        if is_stream:
            batches = pyarrow.ipc.open_stream(mapped)
        else:
            opened = pyarrow.ipc.open_file(mapped)
            batches = (opened.get_batch(index) for index in range(opened.num_record_batches))
        for batch in batches:
            yield batch.select(_columns(batch.schema.names, wanted))


def _columns(names: Sequence[str], wanted: str | None) -> list[str]:
    if wanted is None:
        return list(names)
    return [name for name in names if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", wanted)]
