"""`oreal-doctor`: what this machine has and what an experiment lacks on it."""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.markup import escape

from oreal_megatron.cli.errors import reporting
from oreal_megatron.cli.planning import planned_config
from oreal_megatron.machine.doctor import examine


def doctor() -> None:
    """`oreal-doctor`: exit status 1 where something that the experiment needs is missing."""
    parser = argparse.ArgumentParser(
        prog="oreal-doctor",
        description="Says what this machine has and what an experiment lacks on it, with the command that mends it.",
        epilog="example: srun --gpus-per-node=8 oreal-doctor experiment=oreal_32b",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for oreal-train")
    arguments = parser.parse_intermixed_args()
    console = Console(highlight=False, soft_wrap=True)
    reporting(lambda: _doctor(console, arguments))


def _doctor(console: Console, arguments: argparse.Namespace) -> int:
    config = planned_config(arguments.overrides, console)
    with console.status("looking"):
        findings = examine(config)
    for finding in findings:
        mark = "[red]missing[/]" if finding.is_problem else "[green]there[/]  " if finding.found else "absent "
        console.print(f"{mark}  {finding.name:20} {escape(finding.found or finding.remedy)}")  # pip's [extras] too
    return int(any(finding.is_problem for finding in findings))
