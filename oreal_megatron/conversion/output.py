"""An output directory that appears when it is complete, and whose creation can be resumed after a kill.

Files are created in `NAME.partial/` next to the target, each under a temporary name until it is complete, and the
directory is renamed at the end. A second run on the same input keeps the files that are complete.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from oreal_megatron.files import sync, write_atomically

_MADE_FROM = ".made_from.json"


class OutputDirectory:
    """A directory to create; until `commit` its files are in `partial`."""

    def __init__(self, target: Path):
        self.target = target
        self.partial = target.with_name(target.name + ".partial")

    def open(self, made_from: Mapping[str, Any], num_bytes: int) -> bool:
        """Prepares `partial`; returns whether it has files of an earlier, killed run on the same input.

        made_from: everything that the files' content depends on. num_bytes: disk space that they need.

        Raises:
            ValueError: the target exists and is not empty, or the disk has too little space.
        """
        if self.target.exists() and (not self.target.is_dir() or any(self.target.iterdir())):
            raise ValueError(f"{self.target} exists and is not empty. Choose another output, or remove it.")
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
                f"{self.target}: {num_bytes - there:,} bytes are to be written, the disk has {free:,} free. "
                "Nothing was written."
            )
        write_atomically(note, json.dumps(made))
        return goes_on

    def commit(self) -> None:
        """Gives the directory its name; all of its files must be on disk."""
        (self.partial / _MADE_FROM).unlink()
        sync(self.partial)
        if self.target.exists():
            self.target.rmdir()
        os.replace(self.partial, self.target)
        sync(self.target.parent)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Opens a file that gets its name when it is complete and on disk: `with new_file(path) as stream`."""
    unfinished = path.with_name(path.name + ".unfinished")
    with open(unfinished, "wb") as stream:
        yield stream
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(unfinished, path)


def explained(error: OSError, target: Path) -> OSError:
    """Returns an error of writing, with a remedy if the disk is full."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return OSError(
            error.errno,
            f"{os.strerror(error.errno)}; {target} was not made. Free disk space and run the same command again: "
            "finished files are kept",
            str(error.filename or target),
        )
    return error


def copy_beside(source: Path, target: Path, *, without: tuple[str, ...], only: tuple[str, ...] | None = None) -> None:
    """Copies a directory's files (not its directories) unchanged.

    without: endings of the names of files that are left out. only: names of the files that are copied; None: all.
    """
    for file in sorted(source.iterdir()):
        if only is not None and file.name not in only:
            continue
        if file.is_file() and not file.name.endswith(without) and not file.name.startswith("."):
            shutil.copyfile(file, target / file.name)
