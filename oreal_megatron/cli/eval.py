"""`oreal-eval`: scores a model on benchmarks without training it, and compares two evaluations."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from omegaconf import DictConfig
from rich.console import Console

from oreal_megatron.cli.arguments import add_overrides, command_parser, positive
from oreal_megatron.cli.errors import run_command
from oreal_megatron.cli.model_argument import model_settings, opened_model
from oreal_megatron.compose import validated
from oreal_megatron.config import TrainConfig
from oreal_megatron.files import write_atomically

_DESCRIPTION = """\
Scores the model of a Hugging Face directory on benchmarks: greedy pass@1 and, with samples, avg@k, pass@k and maj@k,
each with a 95% interval. Writes evaluation.json, evaluation.html and responses/ into run.dir, by default
evaluations/NAME of the model's directory. A killed evaluation continues with the same command. `oreal-eval compare`
compares two evaluations problem by problem.

A benchmark is a JSONL file with question and gold_answer. Settings are those of experiment=own_model; overrides change
them, for example prompt=deepseek_r1, or rollout=sglang resources=h100."""
_EXAMPLE = """\
oreal-eval models/Qwen2.5-7B --benchmark math500=data/math500.jsonl
  oreal-eval models/Qwen2.5-7B --benchmark aime24=data/aime24.jsonl --samples 16 run.dir=evaluations/before
  oreal-eval models/Qwen2.5-7B evaluation=benchmarks cluster.data=data rollout=sglang resources=h100
  oreal-eval compare evaluations/before evaluations/after"""


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs `oreal-eval`. Exit status 75: it was asked to stop, and the same command continues."""
    given = sys.argv[1:] if argv is None else list(argv)
    if given[:1] == ["compare"]:
        parser = command_parser(
            "oreal-eval compare",
            "Compares two evaluations on the problems that both have: the difference of every score with its 95%\n"
            "interval, and the problems whose greedy response became correct (+) or incorrect (-).",
            example="oreal-eval compare evaluations/before evaluations/after --json differences.json",
        )
        parser.add_argument("first", type=Path, metavar="FIRST", help="run.dir of an evaluation")
        parser.add_argument("second", type=Path, metavar="SECOND", help="run.dir of another evaluation")
        parser.add_argument("--json", type=Path, metavar="FILE", help="file to write the comparison to as JSON")
        arguments = parser.parse_args(given[1:])
        run_command(lambda: _compare(arguments))
    parser = command_parser("oreal-eval", _DESCRIPTION, example=_EXAMPLE)
    parser.add_argument("model", metavar="MODEL", help="Hugging Face directory with config.json, weights and tokenizer")
    add_overrides(parser)
    parser.add_argument(
        "--benchmark",
        type=_benchmark,
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="benchmark to score on, by the name that results have; may be given several times",
    )
    parser.add_argument(
        "--samples", type=int, metavar="K", help="samples for each problem beside the greedy response (default: 0)"
    )
    parser.add_argument(
        "--limit", type=positive, metavar="N", help="problems from the start of each file (default: all)"
    )
    arguments = parser.parse_intermixed_args(given)
    run_command(lambda: _evaluate(arguments), continues=True)


def _benchmark(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FILE, such as math500=data/math500.jsonl")
    return name, path


def _evaluate(arguments: argparse.Namespace) -> int:
    config = evaluation_config(arguments)
    with opened_model(config) as (workspace, sampler, weights):
        # Imported here because they import torch and scipy, which --help should not wait for.
        from oreal_megatron.evaluation_report import print_results
        from oreal_megatron.model_evaluation import evaluate_model

        results = evaluate_model(workspace, sampler, weights=weights)
        is_main = workspace.groups.is_main
    if is_main:
        console = _console()
        print_results(console, results)
        console.print(f"every response: {Path(config.run.dir) / 'evaluation.html'}", markup=False)
    return 0


def evaluation_config(arguments: argparse.Namespace) -> TrainConfig:
    """Returns the configuration of an evaluation: that of the overrides, with nothing that trains.

    Raises:
        ConfigError: with all violations.
        ValueError: MODEL is no Hugging Face directory, an override sets what an evaluation fixes, or there is no
            benchmark.
    """
    raw = model_settings(arguments, command="oreal-eval", directory="evaluations/${run.name}")
    _add_benchmarks(raw, arguments)
    return validated(raw)


def _add_benchmarks(raw: DictConfig, arguments: argparse.Namespace) -> None:
    """Adds the benchmarks of --benchmark, and sets --samples and --limit for all benchmarks, in place."""
    benchmarks = raw.evaluation.benchmarks
    for name, path in arguments.benchmark:
        if name in benchmarks:
            raise ValueError(f"--benchmark {name}={path}: there is a benchmark {name} already. Give it another name")
        benchmarks[name] = {"path": path, "samples": 0, "limit": None}
    if not benchmarks:
        raise ValueError(
            "there is no benchmark. Name one with --benchmark NAME=FILE.jsonl, or several with evaluation=benchmarks "
            "cluster.data=DIR"
        )
    for name, benchmark in benchmarks.items():
        if isinstance(benchmark, str):
            benchmarks[name] = {"path": benchmark}
    for benchmark in benchmarks.values():
        if arguments.samples is not None:
            benchmark.samples = arguments.samples
        if arguments.limit is not None:
            benchmark.limit = arguments.limit


def _compare(arguments: argparse.Namespace) -> int:
    from oreal_megatron.evaluation_report import comparison, differing_settings, print_comparison, read_results

    first, second = read_results(arguments.first), read_results(arguments.second)
    compared = comparison(first, second)
    print_comparison(_console(), compared)
    for setting in differing_settings(first, second):
        _console().print(f"other settings, so the models are not all that differs: {setting}", markup=False)
    if arguments.json is not None:
        write_atomically(arguments.json, json.dumps(compared, indent=1) + "\n")
    return 0


def _console() -> Console:
    """Returns the console of the command's output, wide where it is no terminal."""
    console = Console(highlight=False, soft_wrap=False)
    return console if console.is_terminal else Console(highlight=False, width=160)


if __name__ == "__main__":
    main()
