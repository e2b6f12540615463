"""Results of `oreal-eval`: evaluation.json, evaluation.html, responses/ and tables; and comparisons of two results."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from oreal_megatron import __version__
from oreal_megatron.files import json_line, write_atomically, write_parts_atomically
from oreal_megatron.intervals import LEVEL, Interval, interval_of_mean, paired_interval, sign_test
from oreal_megatron.scores import all_responses, benchmark_metrics, is_stopped, mean
from oreal_megatron.trajectories import to_records
from oreal_megatron.types import Benchmark, GradedRollout

RESULTS = "evaluation.json"
GREEDY = "greedy_pass@1"


def benchmark_results(
    benchmark: Benchmark,
    greedy: Sequence[GradedRollout],
    sampled: Sequence[Sequence[GradedRollout]],
    scores: Mapping[str, Sequence[float]],
) -> dict[str, Any]:
    """Returns the part of evaluation.json about one benchmark: metrics, intervals, lengths, and scores by problem."""
    responses = all_responses(greedy, sampled)
    lengths = [graded.rollout.num_response_tokens for graded in responses]
    return {
        "samples": benchmark.samples,
        "responses": len(responses),
        "metrics": benchmark_metrics(greedy, sampled, scores),
        "intervals": {name: interval_of_mean(values) for name, values in scores.items()},
        "tokens": {"mean": mean(lengths), "median": statistics.median(lengths), "longest": max(lengths)},
        "problems": [
            {
                "id": prompt.id,
                "question": prompt.question,
                "gold_answer": prompt.gold_answer,
                "scores": {name: values[index] for name, values in scores.items()},
            }
            for index, prompt in enumerate(benchmark.prompts)
        ],
    }


def write_responses(
    directory: Path, name: str, greedy: Sequence[GradedRollout], sampled: Sequence[Sequence[GradedRollout]]
) -> None:
    """Writes responses/NAME.greedy.jsonl and, with samples, responses/NAME.sampled.jsonl, as trajectories are written.

    Raises:
        OSError: the disk refused.
    """
    for kind, groups in (("greedy", [[graded] for graded in greedy]), ("sampled", sampled)):
        if groups:
            write_parts_atomically(directory / "responses" / f"{name}.{kind}.jsonl", map(json_line, to_records(groups)))


def write_results(
    directory: Path, settings: Mapping[str, Any], benchmarks: Mapping[str, Any], records: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Writes evaluation.json and evaluation.html, and returns the content of evaluation.json.

    settings: what was evaluated, and how. benchmarks: `benchmark_results` by name. records: `response_records` of all
    benchmarks, for the page.

    Raises:
        OSError: the disk refused.
    """
    results = {
        **settings,
        "version": __version__,
        "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "confidence_level": LEVEL,
        "benchmarks": benchmarks,
    }
    write_atomically(directory / RESULTS, json.dumps(results, indent=1) + "\n")
    environment = jinja2.Environment(autoescape=True)
    template = resources.files("oreal_megatron").joinpath("templates/evaluation.html").read_text()
    page = environment.from_string(template).render(
        results=results, scores=score_rows(benchmarks), shares=response_rows(benchmarks), records=records
    )
    write_atomically(directory / "evaluation.html", page)
    return results


def response_records(
    name: str, greedy: Sequence[GradedRollout], sampled: Sequence[Sequence[GradedRollout]]
) -> list[dict[str, Any]]:
    """Returns what evaluation.html shows of every response of a benchmark: problem by problem, the greedy one first."""
    groups = sampled or [[] for _ in greedy]
    return [
        {
            "benchmark": name,
            "problem": graded.rollout.prompt.id,
            "question": graded.rollout.prompt.question,
            "gold": graded.rollout.prompt.gold_answer,
            "kind": kind,
            "verdict": str(graded.verdict),
            "reason": graded.grade.reason,
            "stage": graded.grade.stage,
            "answer": graded.grade.answer,
            "tokens": graded.rollout.num_response_tokens,
            "truncated": not is_stopped(graded),
            "text": graded.rollout.text,
        }
        for best, group in zip(greedy, groups, strict=True)
        for kind, graded in [("greedy", best), *((f"sample {i}", one) for i, one in enumerate(group))]
    ]


def score_rows(benchmarks: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Returns (benchmark, problems, name of the score, value, interval) of every score, as text."""
    return [
        (name, f"{len(results['problems'])}", score, f"{results['metrics'][score]:.1%}", _shown(interval))
        for name, results in benchmarks.items()
        for score, interval in results["intervals"].items()
    ]


def response_rows(benchmarks: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Returns (benchmark, responses, truncated, UNDECIDED, no answer, mean, median and longest length) as text."""
    return [
        (
            name,
            f"{results['responses']}",
            *(
                f"{results['metrics'][share]:.1%}"
                for share in ("truncated_share", "undecided_share", "no_answer_share")
            ),
            *(f"{results['tokens'][kind]:.0f}" for kind in ("mean", "median", "longest")),
        )
        for name, results in benchmarks.items()
    ]


def print_results(console: Console, results: Mapping[str, Any]) -> None:
    """Prints the scores with their intervals, and the shares and lengths of responses."""
    scores = _table(("benchmark", "problems", "score", "value", f"{LEVEL:.0%} interval"), texts=(0, 2))
    for row in score_rows(results["benchmarks"]):
        scores.add_row(*map(escape, row))
    columns = ("benchmark", "responses", "truncated", "UNDECIDED", "no answer", "tokens: mean", "median", "longest")
    shares = _table(columns, texts=(0,))
    for row in response_rows(results["benchmarks"]):
        shares.add_row(*map(escape, row))
    console.print(scores, shares)


def read_results(path: Path) -> dict[str, Any]:
    """Reads the evaluation.json of a directory of `oreal-eval`.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    file = path / RESULTS if path.is_dir() else path
    try:
        results = json.loads(file.read_text())
        if not isinstance(results["benchmarks"], dict):
            raise TypeError("`benchmarks` is not an object")
    except FileNotFoundError as error:
        raise ValueError(f"{file}: there is no such file. Name the run.dir of a finished oreal-eval") from error
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: not the results of oreal-eval: {error!r}. Run the same oreal-eval again") from error
    return results


def comparison(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Returns, by benchmark that both have, paired differences of scores and the problems whose greedy verdict flipped.

    first, second: results of `read_results`. A difference is the second's score less the first's, over the problems
    that both answered.

    Raises:
        ValueError: they have no benchmark, or no problem of one, in common; or a problem is not the same in both.
    """
    names = [name for name in first["benchmarks"] if name in second["benchmarks"]]
    if not names:
        raise ValueError(
            f"no benchmark in common: {', '.join(first['benchmarks'])} in the first, {', '.join(second['benchmarks'])} "
            "in the second. Evaluate both on one benchmark of the same name"
        )
    return {name: _compared(name, first["benchmarks"][name], second["benchmarks"][name]) for name in names}


def differing_settings(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """Returns the settings in which two evaluations differ, except the model, as texts with both values."""
    names = ("dtype", "backend", "max_sequence_length", "sampling", "prompt", "verifier", "generation", "reward")
    return [
        f"{name}: {first.get(name)} in the first, {second.get(name)} in the second"
        for name in names
        if first.get(name) != second.get(name)
    ]


def _compared(name: str, first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    others = {problem["id"]: problem for problem in second["problems"]}
    pairs = [(problem, others[problem["id"]]) for problem in first["problems"] if problem["id"] in others]
    for a, b in pairs:
        if (a["question"], a["gold_answer"]) != (b["question"], b["gold_answer"]):
            raise ValueError(
                f"{name}: problem {a['id']} has another question or gold answer in the second evaluation, so the two "
                "are of different files. Evaluate both on one file"
            )
    if not pairs:
        raise ValueError(f"{name}: no problem in common, by id. Evaluate both on one file")
    scores = {}
    for score in pairs[0][0]["scores"]:
        if score in pairs[0][1]["scores"]:
            values = [[problem["scores"][score] for problem in side] for side in zip(*pairs, strict=True)]
            before, after = map(mean, values)
            interval = paired_interval(*values)
            scores[score] = {"first": before, "second": after, "difference": after - before, "interval": interval}
    gained = [b for a, b in pairs if a["scores"][GREEDY] < b["scores"][GREEDY]]
    lost = [b for a, b in pairs if a["scores"][GREEDY] > b["scores"][GREEDY]]
    return {
        "problems": len(pairs),
        "left_out": len(first["problems"]) + len(second["problems"]) - 2 * len(pairs),
        "scores": scores,
        "sign_test": sign_test(len(gained), len(lost)),
        "gained": [{key: problem[key] for key in ("id", "question", "gold_answer")} for problem in gained],
        "lost": [{key: problem[key] for key in ("id", "question", "gold_answer")} for problem in lost],
    }


def print_comparison(console: Console, compared: Mapping[str, Any]) -> None:
    """Prints the paired differences of every benchmark, then the problems that flipped."""
    columns = ("benchmark", "problems", "score", "first", "second", "difference", f"{LEVEL:.0%} interval")
    table = _table(columns, texts=(0, 2))
    for name, one in compared.items():
        for score, value in one["scores"].items():
            shown = (f"{value['first']:.1%}", f"{value['second']:.1%}", f"{value['difference']:+.1%}")
            row = (name, f"{one['problems']}", score, *shown, _shown(value["interval"], sign="+"))
            table.add_row(*map(escape, row))
    console.print(table)
    for name, one in compared.items():
        left_out = f"; {one['left_out']} problems are in one evaluation only and left out" if one["left_out"] else ""
        console.print(
            f"{name}: greedy gained {len(one['gained'])} and lost {len(one['lost'])} of {one['problems']} problems "
            f"(sign test: p = {one['sign_test']:.3g}){left_out}",
            markup=False,
        )
        for mark, problems in (("+", one["gained"]), ("-", one["lost"])):
            for problem in problems:
                question = " ".join(problem["question"].split())
                beginning = question if len(question) <= 100 else question[:97] + "..."
                console.print(f"  {mark} {problem['id']}  gold {problem['gold_answer']}  {beginning}", markup=False)


def _table(columns: Sequence[str], *, texts: Sequence[int]) -> Table:
    """Returns an empty table; columns are aligned to the right, except those whose numbers are in `texts`."""
    table = Table()
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index in texts else "right", no_wrap=index in texts)
    return table


def _shown(interval: Interval | None, *, sign: str = "") -> str:
    return "-" if interval is None else f"{interval[0]:{sign}.1%} to {interval[1]:{sign}.1%}"
