"""Prompt and demonstration files: JSONL with the keys of OREAL-RL-Prompts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from oreal_megatron.config import BalanceBin
from oreal_megatron.data.arithmetic import Demonstration
from oreal_megatron.files import write_atomically
from oreal_megatron.types import Prompt


def read_prompts(path: str | Path) -> list[Prompt]:
    """Reads lines with `question`, `gold_answer`, and optionally `pass_rate` and `id` (default: the line number).

    Raises:
        ValueError: a line is not such an object, an id occurs twice, or the file is empty; names file and line.
    """
    prompts: dict[str, Prompt] = {}
    for number, record in _records(path):
        where = f"{path}:{number}"
        pass_rate = record.get("pass_rate")
        if pass_rate is not None and not (isinstance(pass_rate, int | float) and 0 <= pass_rate <= 1):
            raise ValueError(f"{where}: pass_rate is {pass_rate!r}, not a number in [0, 1]")
        prompt = Prompt(
            id=str(record.get("id", f"{Path(path).stem}-{number:06d}")),
            question=_text(record, "question", where),
            gold_answer=_text(record, "gold_answer", where),
            pass_rate=None if pass_rate is None else float(pass_rate),
        )
        if prompt.id in prompts:
            raise ValueError(f"{where}: id {prompt.id!r} occurs twice")
        prompts[prompt.id] = prompt
    if not prompts:
        raise ValueError(f"{path}: no prompts in it; every line must be a JSON object with question and gold_answer")
    return list(prompts.values())


def write_estimated(path: Path, prompts: Iterable[Prompt], *, source: Sequence[Prompt]) -> None:
    """Writes prompts with pass rates, and with the fingerprint of `source`, the prompts that were estimated."""
    data = fingerprint(source)
    write_atomically(path, "".join(json.dumps({**asdict(p), "source": data}) + "\n" for p in prompts))


def read_estimated(path: Path, *, source: Sequence[Prompt]) -> list[Prompt]:
    """Reads the prompts that `write_estimated` wrote for the same `source`.

    Raises:
        ValueError: the file was written for other prompts.
    """
    now = fingerprint(source)
    for number, record in _records(path):
        if record.get("source") != now:
            raise ValueError(
                f"{path}:{number}: was estimated from other data (fingerprint {record.get('source')}) than data.train "
                f"holds now ({now}); restore the data of the run, or use another run.dir"
            )
    return read_prompts(path)


def fingerprint(records: Iterable[Prompt | Demonstration]) -> str:
    """Returns 16 hex digits that depend on every field of every record and on their order."""
    digest = hashlib.blake2b(digest_size=8)
    for record in records:
        digest.update(json.dumps(asdict(record)).encode() + b"\n")
    return digest.hexdigest()


def read_demonstrations(path: str | Path) -> list[Demonstration]:
    """Reads lines with `question` and `response`. Raises ValueError as `read_prompts` does."""
    found = [
        Demonstration(_text(record, "question", f"{path}:{n}"), _text(record, "response", f"{path}:{n}"))
        for n, record in _records(path)
    ]
    if not found:
        raise ValueError(
            f"{path}: no demonstrations in it; every line must be a JSON object with question and response"
        )
    return found


def balanced(prompts: Sequence[Prompt], bins: Sequence[BalanceBin]) -> list[Prompt]:
    """Repeats each prompt as the bin of its pass rate says; drops prompts without a bin or a pass rate.

    Without bins, returns every prompt once.
    """
    if not bins:
        return list(prompts)
    return [
        prompt
        for prompt in prompts
        for bin in bins
        if prompt.pass_rate is not None and bin.low <= prompt.pass_rate < bin.high
        for _ in range(bin.repeat)
    ]


def _records(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not JSON: {error}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path}:{number}: a JSON object is expected, not {type(record).__name__}")
        yield number, record


def _text(record: dict[str, Any], key: str, where: str) -> str:
    value = record.get(key)
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: `{key}` is {value!r}, a text is expected")
    return value
