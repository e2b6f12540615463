"""Prompt files with the keys of OREAL-RL-Prompts."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from oreal_megatron.config import BalanceBin
from oreal_megatron.data.curation.sources import find_files, read_source
from oreal_megatron.data.curation.text import question_key
from oreal_megatron.data.records import read_records, text_at
from oreal_megatron.files import write_atomically
from oreal_megatron.types import Benchmark, Prompt

logger = logging.getLogger(__name__)

_PROMPT_KEYS = ("question", "gold_answer")


def read_prompts(
    path: str | Path, *, empty_golds: Literal["skip"] | None = None, source: str | None = None
) -> list[Prompt]:
    """Reads records with `question`, `gold_answer`, and optionally `pass_rate` and `id` (default: file and number).

    Logs how many questions occur in several records, and how many of these with different gold answers.

    path: a file (JSONL, Parquet, Arrow, a JSON array), or a directory of a data set, of which the split `train` is
    taken. empty_golds: `skip` leaves out records whose gold_answer is empty, and logs their number. source: name of the
    source, which becomes a part of the ids.

    Raises:
        ValueError: a record is not such an object, an id occurs twice, or there are no records; names file and number.
    """
    prompts: dict[str, Prompt] = {}
    numbers: dict[str, str] = {}
    without_gold = []
    for where, record in prompt_records(path):
        prompt = prompt_of(record, where, source=source)
        number = where.rpartition(":")[2]
        if not prompt.gold_answer.strip():
            without_gold.append(number)
            continue
        if prompt.id in prompts:
            raise ValueError(f"{where}: id {prompt.id!r} occurs twice")
        prompts[prompt.id] = prompt
        numbers[prompt.id] = number
    _check_golds(path, without_gold, len(prompts), empty_golds)
    _log_repeated(path, list(prompts.values()), numbers)
    return list(prompts.values())


def prompt_records(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (file and number, record) of a file or directory of prompts, as `read_prompts` takes it.

    Raises:
        ValueError: it cannot be read, or a record is no object.
    """
    for where, record in read_source(find_files(Path(path), None)):
        if not isinstance(record, dict):
            raise ValueError(f"{where}: a JSON object is expected, not {type(record).__name__}")
        yield where, record


def prompt_of(record: Mapping[str, Any], where: str, *, source: str | None = None) -> Prompt:
    """Returns the prompt of a record; its gold answer may be empty. where: file and number, for messages.

    Raises:
        ValueError: a key is missing, or its value cannot be used.
    """
    question = text_at(record, "question", where, wanted=_PROMPT_KEYS)
    if not question.strip():
        raise ValueError(f"{where}: `question` is {question!r}. Remove the line, or give it a question.")
    gold_answer = (
        "" if record.get("gold_answer", 0) is None else text_at(record, "gold_answer", where, wanted=_PROMPT_KEYS)
    )
    pass_rate = record.get("pass_rate")
    if pass_rate is not None and not (isinstance(pass_rate, int | float) and 0 <= pass_rate <= 1):
        raise ValueError(f"{where}: pass_rate is {pass_rate!r}, not a number in [0, 1]")
    file, _, number = where.rpartition(":")
    id = record.get("id")
    id = f"{Path(file).stem}-{int(number):06d}" if id is None else str(id)
    return Prompt(
        id=id if source is None else f"{source}/{id}",
        question=question,
        gold_answer=gold_answer,
        pass_rate=None if pass_rate is None else float(pass_rate),
        source=source,
    )


def _check_golds(path: str | Path, without_gold: list[str], num_prompts: int, empty_golds: str | None) -> None:
    """Logs the lines without a gold answer, or refuses the file; refuses a file without a prompt."""
    count, first = len(without_gold), ", ".join(without_gold[:5])
    missing = f"{path}: gold_answer is empty on {count} of {num_prompts + count} lines ({first}{', ...' * (count > 5)})"
    if without_gold and empty_golds is None:
        raise ValueError(f"{missing}. Give them gold answers, or set data.empty_golds=skip to leave them out.")
    if not num_prompts:
        raise ValueError(f"{path}: no prompts in it; every line must be a JSON object with question and gold_answer")
    if without_gold:
        logger.warning("%s; they are left out", missing)


def _log_repeated(path: str | Path, prompts: Sequence[Prompt], numbers: dict[str, str]) -> None:
    """Logs questions that are in several records. numbers: number of the record by prompt id."""
    by_question: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        by_question.setdefault(prompt.question.strip(), []).append(prompt)
    repeated = [group for group in by_question.values() if len(group) > 1]
    if not repeated:
        return
    first = " and ".join(numbers[prompt.id] for prompt in repeated[0][:2])
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
        golds = list(dict.fromkeys((prompt.gold_answer.strip(), numbers[prompt.id]) for prompt in differing[0]))
        other = next(gold for gold in golds if gold[0] != golds[0][0])
        logger.warning(
            "%s: %d questions have several gold answers, and responses are graded against each (%r on line %s, %r on "
            "line %s); keep one of them, or let oreal-data dedupe leave these questions out",
            path,
            len(differing),
            *golds[0],
            *other,
        )


def warn_of_common(prompts: Sequence[Prompt]) -> None:
    """Logs how many questions are in several sources."""
    by_question: dict[str, dict[str | None, str]] = {}
    for prompt in prompts:
        by_question.setdefault(prompt.question.strip(), {}).setdefault(prompt.source, prompt.id)
    common = [ids for ids in by_question.values() if len(ids) > 1]
    if common:
        logger.warning(
            "%d questions are in several sources (first: %s), and each source draws them; remove them from one of the "
            "files",
            len(common),
            " and ".join(list(common[0].values())[:2]),
        )


def warn_of_benchmarks(prompts: Sequence[Prompt], benchmarks: Sequence[Benchmark]) -> None:
    """Logs how many problems of each benchmark are trained on, whatever the case, punctuation and layout."""
    trained = {question_key(prompt.question): prompt.id for prompt in prompts}
    for benchmark in benchmarks:
        found = [(p, id) for p in benchmark.prompts if (id := trained.get(question_key(p.question))) is not None]
        if found:
            problem, id = found[0]
            logger.warning(
                "evaluation.benchmarks.%s: %d of %d problems are trained on too (first: %s, as %s), so its scores say "
                "less of other problems. Remove them with oreal-data decontaminate, which finds reworded ones too",
                benchmark.name,
                len(found),
                len(benchmark.prompts),
                problem.id,
                id,
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
    now, by_id, known = fingerprint(source), {prompt.id: prompt for prompt in source}, []
    for number, record in read_records(path):
        if record.get("source") != now:
            raise ValueError(
                f"{path}:{number}: was estimated from other data (fingerprint {record.get('source')}) than data.train "
                f"holds now ({now}); restore the data of the run, or use another run.dir"
            )
        known.append(
            replace(
                by_id[record["id"]],
                pass_rate=record["pass_rate"],
                # Files of version 0.1.0 have no lengths.
                response_tokens=record.get("response_tokens"),
            )
        )
    return known


def fingerprint(records: Iterable[Prompt]) -> str:
    """Returns 16 hex digits that depend on every field of every record's data and on their order.

    A source that is None is left out, so that checkpoints from before there were sources go on. Lengths of responses
    are no data.
    """
    digest = hashlib.blake2b(digest_size=8)
    for record in records:
        fields = {
            name: value
            for name, value in vars(record).items()
            if (name, value) != ("source", None) and name != "response_tokens"
        }
        digest.update(json.dumps(fields).encode() + b"\n")
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
