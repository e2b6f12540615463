"""A directory that is whole or not there, and whose making goes on where it was killed.

Files are made beside the target in `NAME.partial/`, each under a name of its own until it is whole, and the directory
is renamed at the end. Run again on the same input, what is whole there is kept.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from oreal_megatron.files import sync, write_atomically

_MADE_FROM = ".made_from.json"


class OutputDirectory:
    """The directory to make; `partial` is where its files are until `commit`."""

    def __init__(self, target: Path):
        self.target = target
        self.partial = target.with_name(target.name + ".partial")

    def open(self, made_from: Mapping[str, Any], num_bytes: int) -> bool:
        """Prepares `partial`; whether it holds what an earlier, killed run on the same input left.

        made_from: everything that the files' content depends on. num_bytes: room that they need.

        Raises:
            ValueError: the target is there and not empty, or the disk has no room.
        """
        if self.target.exists() and (not self.target.is_dir() or any(self.target.iterdir())):
            raise ValueError(f"{self.target} exists and is not empty; name another output, or remove it")
        note = self.partial / _MADE_FROM
        made = json.loads(json.dumps(made_from))
        goes_on = note.is_file() and json.loads(note.read_text()) == made
        if not goes_on:
            shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True, exist_ok=True)
        there = sum(file.stat().st_size for file in self.partial.iterdir() if file.is_file())
        free = shutil.disk_usage(self.partial).free
        if free < num_bytes - there:
            raise ValueError(
                f"{self.target}: {num_bytes - there:,} bytes are to be written, the disk has {free:,} free; nothing "
                "was written"
            )
        write_atomically(note, json.dumps(made))
        return goes_on

    def commit(self) -> None:
        """Gives the directory its name. Everything in it is on disk before."""
        (self.partial / _MADE_FROM).unlink()
        sync(self.partial)
        if self.target.exists():
            self.target.rmdir()
        os.replace(self.partial, self.target)
        sync(self.target.parent)


class NewFile:
    """A file that appears under its name when it is whole and on disk: `with NewFile(path) as stream`."""

    def __init__(self, path: Path):
        self._path = path
        self._unfinished = path.with_name(path.name + ".unfinished")

    def __enter__(self) -> BinaryIO:
        self._stream = open(self._unfinished, "wb")
        return self._stream

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        with self._stream:
            if error is None:
                self._stream.flush()
                os.fsync(self._stream.fileno())
        if error is None:
            os.replace(self._unfinished, self._path)


def explained(error: OSError, target: Path) -> OSError:
    """An error of writing, with what to do about it."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return OSError(
            error.errno,
            f"{os.strerror(error.errno)}; {target} was not made. Run the same command again with more room: "
            "finished files are kept",
            str(error.filename or target),
        )
    return error


def copy_beside(source: Path, target: Path, *, without: tuple[str, ...]) -> None:
    """Copies a directory's files (not its directories) unchanged, those whose name ends so left out."""
    for file in sorted(source.iterdir()):
        if file.is_file() and not file.name.endswith(without) and not file.name.startswith("."):
            shutil.copyfile(file, target / file.name)
