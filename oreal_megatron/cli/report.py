"""`oreal-report`: writes the HTML report of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from oreal_megatron.cli.arguments import command_parser
from oreal_megatron.cli.errors import run_command


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs `oreal-report`, for a finished or running run."""
    parser = command_parser(
        "oreal-report",
        "Writes report.html into a run's directory: pass@1, losses, KL, calibration, token weights.",
        example="oreal-report runs/arithmetic",
    )
    parser.add_argument("directory", type=Path, help="run.dir of the run")
    arguments = parser.parse_args(argv)
    run_command(lambda: _report(arguments.directory))


def _report(directory: Path) -> int:
    from oreal_megatron.report import write_report

    print(write_report(directory))
    return 0


if __name__ == "__main__":
    main()
