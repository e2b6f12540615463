"""`oreal-doctor`: shows what this machine has, and what an experiment needs that is missing."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from rich.console import Console
from rich.markup import escape

from oreal_megatron.cli.arguments import add_overrides, command_parser
from oreal_megatron.cli.errors import run_command
from oreal_megatron.cli.planning import planned_config
from oreal_megatron.distributed.environment import devices_hidden
from oreal_megatron.machine.doctor import examine


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs `oreal-doctor`. Exit status 1: something that the experiment needs is missing."""
    parser = command_parser(
        "oreal-doctor",
        "Shows what this machine has, and what an experiment needs that is missing, with the command that installs it.",
        example="srun --gpus-per-node=8 oreal-doctor experiment=oreal_32b",
    )
    add_overrides(parser)
    arguments = parser.parse_intermixed_args(argv)
    run_command(lambda: _doctor(Console(highlight=False, soft_wrap=True), arguments))


def _doctor(console: Console, arguments: argparse.Namespace) -> int:
    config = planned_config(arguments.overrides, console, config_dir=arguments.config_dir)
    # The experiment will see no GPU either.
    with console.status("examining this machine"), devices_hidden(when=config.resources.device == "cpu"):
        findings = examine(config)
    for finding in findings:
        mark = "[red]missing[/]" if finding.is_problem else "[green]found[/]  " if finding.found else "absent "
        # A remedy may contain brackets, such as pip's [extras], which are no markup.
        console.print(f"{mark}  {finding.name:20} {escape(finding.found or finding.remedy)}")
    return int(any(finding.is_problem for finding in findings))


if __name__ == "__main__":
    main()
