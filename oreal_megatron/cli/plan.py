"""`oreal-plan`: estimates memory and step time of a run before it is started."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from oreal_megatron.cli.arguments import add_overrides, command_parser, positive
from oreal_megatron.cli.errors import run_command
from oreal_megatron.cli.planning import num_devices, planned_config, planner_of, suggest
from oreal_megatron.planner.planner import search, splits
from oreal_megatron.planner.step_time import read_measured
from oreal_megatron.planner.tables import print_plan, print_search, print_splits


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs `oreal-plan`. Exit status 1: the run does not fit into memory, or its configuration is wrong."""
    parser = command_parser(
        "oreal-plan",
        "Estimates a run before it is started: memory of every rank in every phase, seconds of a step, and the first\n"
        "change to make where it does not fit. Starts nothing, and needs no GPU and no values of a site.",
        example="oreal-plan experiment=oreal_32b parallel.recompute=selective",
    )
    add_overrides(parser)
    parser.add_argument("--devices", type=positive, help="trainer processes; default: resources.trainer_devices")
    parser.add_argument(
        "--measured",
        type=Path,
        action="append",
        default=[],
        metavar="PATH",
        help="file of oreal-doctor --measure, whose figures replace assumed ones, or directory of a run, whose lengths "
        "of responses do; may be given twice, for both",
    )
    listed = parser.add_mutually_exclusive_group()
    listed.add_argument("--search", action="store_true", help="list layouts that fit, fastest first")
    listed.add_argument(
        "--budget",
        type=positive,
        metavar="DEVICES",
        help="list the splits of so many devices between trainer and servers, fastest first",
    )
    arguments = parser.parse_intermixed_args(argv)
    if arguments.budget and arguments.devices:
        parser.error("--budget splits its devices itself; leave out --devices")
    run_command(lambda: _plan(Console(highlight=False, soft_wrap=True), arguments))


def _plan(console: Console, arguments: argparse.Namespace) -> int:
    config = planned_config(arguments.overrides, console, config_dir=arguments.config_dir)
    runs = [path for path in arguments.measured if path.is_dir()]
    files = [path for path in arguments.measured if not path.is_dir()]
    if max(len(runs), len(files)) > 1:
        raise ValueError(f"--measured {arguments.measured[-1]}: name one run and one file of figures at most.")
    measured = read_measured(runs[0]) if runs else None
    replan = planner_of(config, devices=arguments.devices, measured=measured, figures=files[0] if files else None)
    if arguments.search:
        with console.status("planning layouts") as status:
            plans = search(
                config,
                replan,
                num_devices(config, arguments.devices),
                lambda done, total: status.update(f"planning layout {done + 1} of {total}"),
            )
        print_search(console, plans)
        return 0 if plans else 1
    if arguments.budget:
        with console.status("planning splits") as status:
            plans = splits(
                config,
                replan,
                arguments.budget,
                lambda done, total: status.update(f"planning split {done + 1} of {total}"),
            )
        print_splits(console, plans, arguments.budget)
        return 0 if plans else 1
    with console.status("planning"):
        planned = replan(config)
    print_plan(console, planned, measured)
    return suggest(console, planned, replan)


if __name__ == "__main__":
    main()
