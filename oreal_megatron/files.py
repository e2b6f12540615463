"""Durable files: whole or not there, and on the disk before anything relies on them.

A killed process leaves at most a half-written last line (`append_line`), which `whole_lines` leaves out and the next
`open_log` cuts off; `write_atomically` leaves the old file or the new file.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import orjson

_BLOCK_BYTES = 1 << 16


def json_line(record: Mapping[str, Any]) -> bytes:
    """Returns a record as one line of JSON, with its line end. Numpy arrays are lists; NaN and infinity are null."""
    return orjson.dumps(record, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE)


def write_atomically(path: Path, text: str) -> None:
    """Writes a file next to `path`, syncs it, and renames it to `path`.

    Raises:
        OSError: the message names `path`; an earlier file is untouched.
    """
    write_parts_atomically(path, [text.encode()])


def write_parts_atomically(path: Path, parts: Iterable[bytes]) -> None:
    """Writes a file as `write_atomically` does, from parts that are made one after the other.

    Raises:
        OSError: the message names `path`; an earlier file is untouched.
    """
    with written_atomically(path) as file:
        file.writelines(parts)


@contextlib.contextmanager
def written_atomically(path: Path) -> Iterator[IO[bytes]]:
    """Gives a file to write, which becomes `path` once the body has ended without an error.

    Raises:
        OSError: the message names `path`; an earlier file is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        with naming(path):
            with partial.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
            sync(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def open_log(path: Path) -> IO[bytes]:
    """Opens a file of lines for appending; an unfinished last line is cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path):
        is_new = not path.exists()
        file = path.open("a+b")
        file.truncate(_end_of_last_line(file))
        if is_new:
            sync(path.parent)
        return file


def _end_of_last_line(file: IO[bytes]) -> int:
    """Returns the offset behind the last line end of an open file; 0 without one. Reads the end of the file only."""
    end = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(end - _BLOCK_BYTES, 0)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def append_line(file: IO[bytes], line: bytes) -> None:
    """Appends a line, which ends with a line end, to an open log; on return it is on the disk.

    Raises:
        OSError: the message names the file; readers leave out a line that was written in part.
    """
    with naming(Path(file.name)):
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def whole_lines(path: Path) -> Iterator[bytes]:
    """Yields the finished lines of a log, without line ends; none where there is no file."""
    if path.is_file():
        with path.open("rb") as file:
            yield from (line[:-1] for line in file if line.endswith(b"\n"))


def kept_id(path: Path) -> str:
    """Returns the random id, 16 hexadecimal digits, that a file holds; writes the file where there is none."""
    if not path.is_file():
        write_atomically(path, uuid.uuid4().hex[:16])
    return path.read_text()


def sync(path: Path) -> None:
    """Puts a file's content, or a directory's entries, on the disk: a rename or a new file is only then durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Adds the file's name to an OSError of the body that has none."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise
