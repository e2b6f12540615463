"""`oreal-plan`: does a run fit into memory, and how long is a step?"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from oreal_megatron.cli.errors import reporting
from oreal_megatron.cli.planning import num_devices, planned_config, planner_of, suggest
from oreal_megatron.planner.planner import search
from oreal_megatron.planner.step_time import read_measured
from oreal_megatron.planner.tables import show_plan, show_search


def plan() -> None:
    """`oreal-plan`: exit status 0 where it fits, 1 where it does not or the configuration is wrong."""
    parser = argparse.ArgumentParser(
        prog="oreal-plan",
        description="Says before anything is started whether a run fits into memory, rank by rank and phase by phase, "
        "how long a step takes, and what to change first. Starts nothing and needs no GPU and no site values.",
        epilog="example: oreal-plan experiment=oreal_32b parallel.recompute=selective",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for oreal-train")
    parser.add_argument("--devices", type=int, help="trainer processes; default: resources.trainer_devices")
    parser.add_argument("--measured", type=Path, metavar="RUN", help="a run's directory, whose metrics are used")
    parser.add_argument("--search", action="store_true", help="look for layouts that fit, quickest first")
    arguments = parser.parse_intermixed_args()
    console = Console(highlight=False, soft_wrap=True)
    reporting(lambda: _plan(console, arguments))


def _plan(console: Console, arguments: argparse.Namespace) -> int:
    config = planned_config(arguments.overrides, console)
    measured = read_measured(arguments.measured) if arguments.measured else None
    replan = planner_of(config, devices=arguments.devices, measured=measured)
    if arguments.search:
        with console.status("layouts") as status:
            plans = search(
                config,
                replan,
                num_devices(config, arguments.devices),
                lambda done, of: status.update(f"layout {done + 1} of {of}"),
            )
        show_search(console, plans)
        return 0 if plans else 1
    with console.status("counting"):
        planned = replan(config)
    show_plan(console, planned, measured)
    return suggest(console, planned, replan)
