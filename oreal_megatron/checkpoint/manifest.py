"""Manifest of a checkpoint: manifest.json lists every file with its size and checksum."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from oreal_megatron.files import write_atomically

MANIFEST = "manifest.json"
_CHUNK_BYTES = 1 << 22


def checksum(path: Path) -> dict[str, int]:
    """Returns `{"bytes": ..., "crc32": ...}` of a file."""
    crc = size = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            crc, size = zlib.crc32(chunk, crc), size + len(chunk)
    return {"bytes": size, "crc32": crc}


def write_manifest(directory: Path, files: Mapping[str, Mapping[str, int]], **notes: Any) -> None:
    """Writes the manifest, which makes the directory whole. notes: further keys."""
    write_atomically(directory / MANIFEST, json.dumps({**notes, "files": files}, indent=1, sort_keys=True) + "\n")


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """Returns the manifest; None where there is no readable manifest."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        return manifest if isinstance(manifest["files"], dict) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def damages(directory: Path, *, part: int, of: int) -> list[str]:
    """Lists what differs from the manifest in every `of`-th file from number `part`; empty where nothing does."""
    manifest = read_manifest(directory)
    if manifest is None:
        return [f"{MANIFEST} is missing or cannot be read"]
    found = []
    for name, expected in sorted(manifest["files"].items())[part::of]:
        path = directory / name
        if not path.is_file():
            found.append(f"{name} is missing")
        elif (size := path.stat().st_size) != expected["bytes"]:
            found.append(f"{name} has {size} bytes, {expected['bytes']} were written")
        elif checksum(path) != expected:
            found.append(f"{name} does not hold the bytes that were written")
    return found
