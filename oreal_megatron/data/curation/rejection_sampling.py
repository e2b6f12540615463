"""Rejection sampling: the best verified responses of each problem, from graded rollouts, as demonstrations."""

from __future__ import annotations

import functools
import heapq
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import orjson

from oreal_megatron.data.curation.report import Report
from oreal_megatron.data.curation.text import question_key
from oreal_megatron.files import json_line, write_parts_atomically
from oreal_megatron.types import FinishReason, Verdict

Ranking = Literal["shortest", "reward_model"]
"""Order of the responses to a problem: fewest tokens first, or highest outcome score of the reward model first."""
_FILES = ("trajectories/*.jsonl", "responses/*.jsonl", "journal/*.replica_*.jsonl")
"""Graded rollouts in the directories of a run, of oreal-eval and of oreal-data pass-rates: the first that there are."""


def rollout_files(path: Path) -> list[Path]:
    """Returns the files of graded rollouts of a file, or of the directory of a run or evaluation.

    Raises:
        ValueError: there are none.
    """
    if path.is_file():
        return [path]
    for pattern in _FILES:
        if files := sorted(path.glob(pattern)):
            return files
    raise ValueError(
        f"{path}: there are no graded rollouts. Name the directory of a run with tracking.trajectories=true, of "
        "oreal-eval or of oreal-data pass-rates, or a file of trajectories."
    )


_KEYS = (
    ("prompt", "question"),
    ("prompt", "id"),
    ("prompt", "gold_answer"),
    ("text",),
    ("finish_reason",),
    ("response_ids",),
    ("sample_index",),
    ("grade", "verdict"),
    ("grade", "stage"),
)
"""Keys of a graded rollout that are read."""
Place = tuple[str, int]
"""File and line of a rollout, and its number on the line; lines that are appended meanwhile do not change it."""


def read_rollouts(files: Sequence[Path], advance: Callable[[], None] = lambda: None) -> Iterator[tuple[Place, Any]]:
    """Yields the place and record of every graded rollout, in trajectories or journals. advance: called for a line.

    Raises:
        ValueError: a line is not such a record; the message names file and line.
    """
    for file in files:
        with file.open("rb") as opened:
            for number, line in enumerate(opened, start=1):
                where = f"{file}:{number}"
                try:
                    record = orjson.loads(line)
                    rollouts = record.get("rollouts", [record])
                    for rollout in rollouts:
                        for keys in _KEYS:
                            functools.reduce(operator.getitem, keys, rollout)
                except (KeyError, TypeError, ValueError, AttributeError) as error:
                    if not line.endswith(b"\n"):  # left by a killed process
                        continue
                    raise ValueError(f"{where}: not a graded rollout: {error!r}") from error
                yield from (((where, index), rollout) for index, rollout in enumerate(rollouts))
                advance()


def write_demonstrations(
    files: Sequence[Path],
    output: Path,
    *,
    best: int,
    by: Ranking,
    as_messages: bool,
    advance: Callable[[], None],
) -> Report:
    """Writes the `best` verified responses of each problem as demonstrations, with where they come from.

    Verified responses are CORRECT and end with the stop token. Of responses to a problem that differ in case,
    punctuation and layout alone, the first in the ranking is taken. The files are read twice.

    as_messages: write `messages`, a turn of the user and one of the assistant, in the place of `question` and
    `response`. advance: is called twice for each line.

    Raises:
        ValueError: a line is no graded rollout, or no response is verified and can be ranked.
    """
    report = Report()
    chosen = _chosen(files, best, by, report, advance)
    write_parts_atomically(output, _lines(files, chosen, as_messages, advance))
    return report


def _chosen(files: Sequence[Path], best: int, by: Ranking, report: Report, advance: Callable[[], None]) -> set[Place]:
    """Returns the places of the rollouts to write."""
    ranked: dict[bytes, dict[bytes, tuple[float, int, Place]]] = {}
    """Rank, number and place of the best of equal responses, by the keys of question and response."""
    for index, (place, rollout) in enumerate(read_rollouts(files, advance)):
        responses = ranked.setdefault(question_key(rollout["prompt"]["question"]), {})
        if (fault := _fault(rollout, by)) is not None:
            report.counts[f"left out, {fault}"] += 1
            continue
        key, rank = question_key(rollout["text"]), (_rank(rollout, by), index, place)
        report.counts["left out, equal to another response"] += key in responses
        responses[key] = min(rank, responses.get(key, rank))
    chosen = {place for responses in ranked.values() for *_, place in heapq.nsmallest(best, responses.values())}
    report.counts["written"] = len(chosen)
    report.counts["left out, behind better ones"] = sum(map(len, ranked.values())) - len(chosen)
    solved = sum(map(bool, ranked.values()))
    report.tables["problems"] = Counter({"with a verified response": solved, "without": len(ranked) - solved})
    if not chosen:
        counts = ", ".join(f"{count} {kind}" for kind, count in report.counts.items() if count)
        raise ValueError(f"{files[0]}: there is no response to write for {len(ranked)} problems: {counts}.")
    return chosen


def _fault(rollout: Mapping[str, Any], by: Ranking) -> str | None:
    """Returns the reason for which a response is no demonstration; None: it is verified, and can be ranked."""
    if rollout["grade"]["verdict"] != Verdict.CORRECT:
        return str(rollout["grade"]["verdict"])
    if rollout["finish_reason"] != FinishReason.STOP:
        return "truncated"
    if rollout.get("inserted_spans"):
        return "of several turns"  # a demonstration of one turn would train a tool's output
    return "without a score of the reward model" if by == "reward_model" and outcome_score(rollout) is None else None


def _rank(rollout: Mapping[str, Any], by: Ranking) -> float:
    """Returns a number that is lowest for the best response: of tokens, or the negative outcome score."""
    score = outcome_score(rollout)
    return float(len(rollout["response_ids"])) if by == "shortest" or score is None else -score


def outcome_score(rollout: Mapping[str, Any]) -> float | None:
    """Returns the reward model's logit that the response is correct: the mean of its token scores; None without."""
    if (logit := rollout.get("reward_model_logit")) is not None:
        return float(logit)
    scores = rollout.get("token_scores")
    return sum(scores) / len(scores) if scores else None


def _lines(
    files: Sequence[Path], chosen: set[Place], as_messages: bool, advance: Callable[[], None]
) -> Iterator[bytes]:
    for place, rollout in read_rollouts(files, advance):
        if place in chosen:
            question, response = rollout["prompt"]["question"], rollout["text"]
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": response}]
            yield json_line(
                {
                    **({"messages": turns} if as_messages else {"question": question, "response": response}),
                    "gold_answer": rollout["prompt"]["gold_answer"],
                    "answer": rollout["grade"].get("answer", ""),
                    "verdict": rollout["grade"]["verdict"],
                    "verdict_by": rollout["grade"]["stage"],
                    "num_tokens": len(rollout["response_ids"]),
                    "reward_model_logit": outcome_score(rollout),
                    "from": place[0],
                    "prompt_id": rollout["prompt"]["id"],
                    "sample_index": rollout["sample_index"],
                }
            )
