"""`oreal-data skills`: problems like those at which a policy fails."""

from __future__ import annotations

import argparse
from pathlib import Path

from oreal_megatron.cli.arguments import add_subcommand, positive
from oreal_megatron.cli.data_reports import add_output, expression_argument, progress_bar, rate, show
from oreal_megatron.verifier.config import JudgeConfig


def add_skills(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the sub-command."""
    command = add_subcommand(
        commands,
        "skills",
        _skills,
        "Writes problems of a pool that resemble those at which the policy fails.",
        "Problems have skills: by a key of theirs, or named by a served model. A skill fails if more of its problems\n"
        "fail than of all, beyond chance. For each failed problem of such a skill, the most similar problems of the\n"
        "pool with the same skill are written, with where they come from (arXiv 2502.06781).",
        example="oreal-data skills rated.jsonl --pool numina.jsonl --tags topic --output more.jsonl\n"
        "  oreal-data skills rated.jsonl --pool numina.jsonl --endpoint http://node1:30000/v1 --model Qwen2.5-72B \\\n"
        "    --output more.jsonl",
    )
    command.add_argument("file", type=Path, metavar="FILE", help="prompts with pass_rate, of oreal-data pass-rates")
    command.add_argument("--pool", type=Path, required=True, metavar="FILE", help="problems to choose from")
    command.add_argument(
        "--failing",
        type=rate,
        default=0.25,
        metavar="RATE",
        help="highest pass rate of a failure (default: %(default)s)",
    )
    command.add_argument(
        "--similar", type=positive, default=4, metavar="K", help="problems for each failure (default: %(default)s)"
    )
    tags = command.add_mutually_exclusive_group(required=True)
    tags.add_argument(
        "--tags",
        type=expression_argument,
        metavar="EXPRESSION",
        help="place of a problem's skill, or of a list of them, in both files (JMESPath)",
    )
    tags.add_argument(
        "--endpoint", nargs="+", metavar="URL", help="OpenAI-compatible servers of a model that names the skills"
    )
    command.add_argument("--model", default="", metavar="NAME", help="with --endpoint: the name of the model there")
    command.add_argument(
        "--names", type=Path, metavar="FILE", help="with --endpoint: skills to choose from, one a line (default: any)"
    )
    command.add_argument(
        "--cache", type=Path, metavar="FILE", help="with --endpoint: log of skills (default: OUTPUT.skills.jsonl)"
    )
    command.add_argument(
        "--api-key-env", metavar="NAME", help="with --endpoint: environment variable with the bearer token"
    )
    add_output(command, required=True)


def _skills(arguments: argparse.Namespace) -> int:
    from oreal_megatron.data.curation.skills import enhance, tags_at
    from oreal_megatron.data.curation.tagging import model_tagger

    if arguments.tags is not None:
        tag = tags_at(arguments.tags)
    elif not arguments.model:
        raise ValueError("--endpoint is given without --model. Name the model as its server does.")
    else:
        tag = model_tagger(
            JudgeConfig(endpoints=tuple(arguments.endpoint), model=arguments.model, api_key_env=arguments.api_key_env),
            arguments.cache or arguments.output.with_name(f"{arguments.output.name}.skills.jsonl"),
            names=arguments.names.read_text().splitlines() if arguments.names else (),
            progress=progress_bar,
        )
    report = enhance(
        arguments.file,
        arguments.pool,
        arguments.output,
        tag,
        failing=arguments.failing,
        num_similar=arguments.similar,
        progress=progress_bar,
    )
    show(report, arguments, title=str(arguments.file))
    return 0
