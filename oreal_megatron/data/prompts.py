"""Prompt files: JSONL with the keys of OREAL-RL-Prompts."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from oreal_megatron.config import BalanceBin
from oreal_megatron.data.records import read_records, text_at
from oreal_megatron.files import write_atomically
from oreal_megatron.types import Prompt

logger = logging.getLogger(__name__)

_PROMPT_KEYS = ("question", "gold_answer")


def read_prompts(path: str | Path, *, empty_golds: Literal["skip"] | None = None) -> list[Prompt]:
    """Reads lines with `question`, `gold_answer`, and optionally `pass_rate` and `id` (default: the line number).

    Logs how many questions occur on several lines, and how many of these with different gold answers.

    empty_golds: `skip` leaves out lines whose gold_answer is empty, and logs their number.

    Raises:
        ValueError: a line is not such an object, an id occurs twice, or the file is empty; names file and line.
    """
    prompts: dict[str, Prompt] = {}
    lines: dict[str, int] = {}
    without_gold = []
    for number, record in read_records(path):
        where = f"{path}:{number}"
        question = text_at(record, "question", where, wanted=_PROMPT_KEYS)
        if not question.strip():
            raise ValueError(f"{where}: `question` is {question!r}. Remove the line, or give it a question.")
        gold_answer = (
            "" if record.get("gold_answer", 0) is None else text_at(record, "gold_answer", where, wanted=_PROMPT_KEYS)
        )
        if not gold_answer.strip():
            without_gold.append(number)
            continue
        pass_rate = record.get("pass_rate")
        if pass_rate is not None and not (isinstance(pass_rate, int | float) and 0 <= pass_rate <= 1):
            raise ValueError(f"{where}: pass_rate is {pass_rate!r}, not a number in [0, 1]")
        prompt = Prompt(
            id=str(record.get("id", f"{Path(path).stem}-{number:06d}")),
            question=question,
            gold_answer=gold_answer,
            pass_rate=None if pass_rate is None else float(pass_rate),
        )
        if prompt.id in prompts:
            raise ValueError(f"{where}: id {prompt.id!r} occurs twice")
        prompts[prompt.id] = prompt
        lines[prompt.id] = number
    _check_golds(path, without_gold, len(prompts), empty_golds)
    _log_repeated(path, list(prompts.values()), lines)
    return list(prompts.values())


def _check_golds(path: str | Path, without_gold: list[int], num_prompts: int, empty_golds: str | None) -> None:
    """Logs the lines without a gold answer, or refuses the file; refuses a file without a prompt."""
    count, first = len(without_gold), ", ".join(map(str, without_gold[:5]))
    missing = f"{path}: gold_answer is empty on {count} of {num_prompts + count} lines ({first}{', ...' * (count > 5)})"
    if without_gold and empty_golds is None:
        raise ValueError(f"{missing}. Give them gold answers, or set data.empty_golds=skip to leave them out.")
    if not num_prompts:
        raise ValueError(f"{path}: no prompts in it; every line must be a JSON object with question and gold_answer")
    if without_gold:
        logger.warning("%s; they are left out", missing)


def _log_repeated(path: str | Path, prompts: Sequence[Prompt], lines: dict[str, int]) -> None:
    """Logs questions that are on several lines. lines: line number by prompt id."""
    by_question: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        by_question.setdefault(prompt.question.strip(), []).append(prompt)
    repeated = [group for group in by_question.values() if len(group) > 1]
    if not repeated:
        return
    first = " and ".join(str(lines[prompt.id]) for prompt in repeated[0][:2])
    logger.warning(
        "%s: %d lines have %d different questions (lines %s are equal); every line is a prompt of its own, so a "
        "step may draw a question several times. oreal-data dedupe keeps one line of each",
        path,
        len(prompts),
        len(by_question),
        first,
    )
    differing = [group for group in repeated if len({prompt.gold_answer.strip() for prompt in group}) > 1]
    if differing:
        golds = list(dict.fromkeys((prompt.gold_answer.strip(), lines[prompt.id]) for prompt in differing[0]))
        other = next(gold for gold in golds if gold[0] != golds[0][0])
        logger.warning(
            "%s: %d questions have several gold answers, and responses are graded against each (%r on line %d, %r on "
            "line %d); keep one of them, or let oreal-data dedupe leave these questions out",
            path,
            len(differing),
            *golds[0],
            *other,
        )


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
    for number, record in read_records(path):
        if record.get("source") != now:
            raise ValueError(
                f"{path}:{number}: was estimated from other data (fingerprint {record.get('source')}) than data.train "
                f"holds now ({now}); restore the data of the run, or use another run.dir"
            )
    return read_prompts(path)


def fingerprint(records: Iterable[Prompt]) -> str:
    """Returns 16 hex digits that depend on every field of every record and on their order."""
    digest = hashlib.blake2b(digest_size=8)
    for record in records:
        digest.update(json.dumps(asdict(record)).encode() + b"\n")
    return digest.hexdigest()


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
