"""`oreal-data select` and `oreal-data sft-from-rollouts`: the records, or the responses, that are trained on."""

from __future__ import annotations

import argparse
from pathlib import Path

from oreal_megatron.cli.arguments import add_subcommand, positive
from oreal_megatron.cli.data_reports import add_output, expression_argument, progress_bar, rate, show
from oreal_megatron.data.curation.sources import find_files, num_records


def add_select(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the sub-command `select`."""
    command = add_subcommand(
        commands,
        "select",
        _select,
        "Writes the prompts of a band of difficulty, of a topic, or a sample.",
        "Expressions are JMESPath (https://jmespath.org) on a record: a key, or a condition such as\n"
        "\"level == 'Level 5' && contains(skills, 'algebra')\". The order of the records stays.",
        example="oreal-data select rated.jsonl --pass-rate 0.2 0.8 --output middle.jsonl\n"
        "  oreal-data select rated.jsonl --where \"topic == 'Algebra'\" --limit 1000 --output algebra.jsonl\n"
        "  oreal-data select rated.jsonl --balance topic --limit 6000 --output even.jsonl",
    )
    command.add_argument("file", type=Path, metavar="FILE", help="prompts: a file or directory, as data.train takes it")
    command.add_argument(
        "--pass-rate",
        type=rate,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="lowest and highest pass rate, both included; prompts without one are left out",
    )
    command.add_argument(
        "--where", type=expression_argument, metavar="EXPRESSION", help="condition that has to be true"
    )
    command.add_argument("--limit", type=positive, metavar="N", help="largest number of prompts, drawn by --seed")
    command.add_argument(
        "--balance",
        type=expression_argument,
        metavar="EXPRESSION",
        help="value, such as topic, of each of which as many prompts are drawn, as far as there are; without --limit, "
        "as many as the rarest has",
    )
    command.add_argument("--seed", type=int, default=0, help="seed of the sample (default: %(default)s)")
    add_output(command, required=True)


def _select(arguments: argparse.Namespace) -> int:
    from oreal_megatron.data.curation.selection import Selection, select

    selection = Selection(
        pass_rate=tuple(arguments.pass_rate) if arguments.pass_rate else None,
        where=arguments.where,
        limit=arguments.limit,
        balance=arguments.balance,
        seed=arguments.seed,
    )
    with progress_bar("select", 2 * num_records(find_files(arguments.file, None))) as advance:
        report = select(arguments.file, arguments.output, selection, advance=advance)
    show(report, arguments, title=str(arguments.file))
    return 0


def add_sft_from_rollouts(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the sub-command `sft-from-rollouts`."""
    command = add_subcommand(
        commands,
        "sft-from-rollouts",
        _sft_from_rollouts,
        "Writes the best verified responses of each problem as demonstrations (rejection sampling).",
        "Verified responses are CORRECT and end with the stop token. Each demonstration says where it comes from.",
        example="oreal-data sft-from-rollouts pass_rates/Qwen2.5-7B --best 2 --output demonstrations.jsonl\n"
        "  oreal-data sft-from-rollouts runs/oreal_7b --by reward_model --output demonstrations.jsonl",
    )
    command.add_argument(
        "rollouts",
        type=Path,
        nargs="+",
        metavar="ROLLOUTS",
        help="directories of runs, of oreal-data pass-rates or of oreal-eval, or files of trajectories",
    )
    command.add_argument(
        "--best", type=positive, default=1, metavar="N", help="responses to a problem at most (default: %(default)s)"
    )
    command.add_argument(
        "--by",
        choices=("shortest", "reward_model"),
        default="shortest",
        help="best responses: those with fewest tokens, or with the highest score of the run's reward model, where "
        "they have one (default: %(default)s)",
    )
    command.add_argument("--messages", action="store_true", help="write messages in the place of question and response")
    add_output(command, required=True)


def _sft_from_rollouts(arguments: argparse.Namespace) -> int:
    from oreal_megatron.data.curation.rejection_sampling import rollout_files, write_demonstrations

    files = [file for path in arguments.rollouts for file in rollout_files(path)]
    with progress_bar("sft-from-rollouts", 2 * num_records(files)) as advance:
        report = write_demonstrations(
            files,
            arguments.output,
            best=arguments.best,
            by=arguments.by,
            as_messages=arguments.messages,
            advance=advance,
        )
    show(report, arguments, title=", ".join(map(str, arguments.rollouts)))
    return 0
