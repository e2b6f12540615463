"""`oreal-doctor`: shows what this machine has, and what an experiment needs that is missing."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.markup import escape

from oreal_megatron.cli.arguments import add_overrides, command_parser, positive
from oreal_megatron.cli.errors import run_command
from oreal_megatron.cli.measuring import measure
from oreal_megatron.cli.planning import planned_config
from oreal_megatron.machine.doctor import examine


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs `oreal-doctor`. Exit status 1: something that the experiment needs is missing."""
    parser = command_parser(
        "oreal-doctor",
        "Shows what this machine has, and what an experiment needs that is missing, with the command that installs it.",
        example="srun --gpus-per-node=8 oreal-doctor experiment=oreal_32b",
    )
    add_overrides(parser)
    parser.add_argument(
        "--measure",
        type=Path,
        metavar="FILE",
        help="measure instead: matrix products, memory, links between devices, and the time of a token on a rollout "
        "server; oreal-plan --measured FILE plans with the figures",
    )
    parser.add_argument("--server", metavar="URL", help="running server to time; default: launch one of the experiment")
    parser.add_argument(
        "--devices",
        type=positive,
        help="processes that measure here; default: one for each GPU of a node, one on a CPU",
    )
    arguments = parser.parse_intermixed_args(argv)
    run_command(lambda: _doctor(Console(highlight=False, soft_wrap=True), arguments))


def _doctor(console: Console, arguments: argparse.Namespace) -> int:
    config = planned_config(arguments.overrides, console, config_dir=arguments.config_dir)
    if arguments.measure is not None:
        with console.status("measuring") as status:
            is_written = measure(
                config,
                arguments.measure,
                devices=arguments.devices,
                url=arguments.server,
                progress=lambda note: status.update(note),
            )
        if is_written:
            console.print(f"{escape(str(arguments.measure))}\n\n{escape(arguments.measure.read_text())}", end="")
        return 0
    if arguments.server or arguments.devices:
        raise ValueError("--server and --devices belong to --measure FILE. Add it, or leave them out.")
    with console.status("examining this machine"):
        findings = examine(config)
    for finding in findings:
        mark = "[red]missing[/]" if finding.is_problem else "[green]found[/]  " if finding.found else "absent "
        # A remedy may contain brackets, such as pip's [extras], which are no markup.
        console.print(f"{mark}  {finding.name:20} {escape(finding.found or finding.remedy)}")
    return int(any(finding.is_problem for finding in findings))


if __name__ == "__main__":
    main()
