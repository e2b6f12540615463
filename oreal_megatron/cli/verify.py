"""`oreal-verify`: grades a JSONL file of answers."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from pydantic import ValidationError

from oreal_megatron.cli.arguments import command_parser, positive
from oreal_megatron.cli.errors import run_command
from oreal_megatron.verifier.config import VerifierConfig
from oreal_megatron.verifier.grade_file import grade_file

_DESCRIPTION = """\
Grades answers to mathematics problems.

Each line of INPUT is a JSON object:
  gold      the correct answer (also: gold_answer)
  answer    the answer to grade (also: response)
  kind      "pair": answer is the bare final answer; "response": a whole response with its reasoning (default)
  stopped   whether the response ended with the stop token (optional; see --stop-token)
  question  the problem, which only a judge reads (optional)
  id, label optional: copied to the output, and scored in the summary

Each line of OUTPUT, in the same order: id, verdict (CORRECT | INCORRECT | UNDECIDED), reason, stage, seconds."""
_EXAMPLE = """\
printf '%s\\n' '{"id": "a", "gold": "\\\\frac{1}{2}", "answer": "0.5", "kind": "pair"}' > answers.jsonl
  oreal-verify answers.jsonl --output verdicts.jsonl"""


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs `oreal-verify`. Exit status 1: the input or the configuration is wrong."""
    parser = command_parser("oreal-verify", _DESCRIPTION, example=_EXAMPLE)
    parser.add_argument("input", type=Path, metavar="INPUT", help="JSONL file to read")
    parser.add_argument("--output", type=Path, required=True, metavar="OUTPUT", help="JSONL file to write")
    parser.add_argument(
        "--config", type=Path, help="YAML file with the keys of conf/verifier/*.yaml (default: rules only)"
    )
    parser.add_argument(
        "--num-workers", type=positive, help="processes that compare symbolic answers (default: number of processors)"
    )
    parser.add_argument("--timeout-seconds", type=float, help="limit of one comparison")
    parser.add_argument("--cache-path", help="verdict cache to read and write")
    parser.add_argument(
        "--stop-token",
        default="<|im_end|>",
        help="token that ends a finished response (default: %(default)s). If no line of the file contains it, "
        "responses were stored without it and all count as finished.",
    )
    arguments = parser.parse_args(argv)
    run_command(lambda: _verify(arguments))


def _verify(arguments: argparse.Namespace) -> int:
    print(grade_file(_config(arguments), arguments.input, arguments.output, arguments.stop_token), file=sys.stderr)
    return 0


def _config(arguments: argparse.Namespace) -> VerifierConfig:
    fields: dict[str, Any] = {"num_workers": os.cpu_count() or 1}
    if arguments.config is not None:
        try:
            loaded = yaml.safe_load(arguments.config.read_text())
        except yaml.YAMLError as error:
            raise ValueError(f"{arguments.config}: {error}") from error
        if not isinstance(loaded, dict):
            raise ValueError(f"{arguments.config}: it must be a mapping of the keys of conf/verifier/*.yaml.")
        fields.update(loaded)
    for key in ("num_workers", "timeout_seconds", "cache_path"):
        if getattr(arguments, key) is not None:
            fields[key] = getattr(arguments, key)
    try:
        return VerifierConfig.model_validate(fields)
    except ValidationError as error:
        lines = [
            f"{'.'.join(map(str, item['loc'])) or 'verifier'} = {item.get('input')!r}: {item['msg']}"
            for item in error.errors()
        ]
        raise ValueError("\n".join(lines)) from error


if __name__ == "__main__":
    main()
