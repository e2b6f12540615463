"""`oreal-report`: writes the HTML report of a run."""

from __future__ import annotations

import argparse
from pathlib import Path


def report() -> None:
    """`oreal-report`: the report of a finished or running run."""
    parser = argparse.ArgumentParser(
        description="Writes report.html into a run's directory: pass@1, losses, KL, calibration, token weights.",
        epilog="example: oreal-report runs/arithmetic",
    )
    parser.add_argument("directory", type=Path, help="run.dir of the run")
    from oreal_megatron.report import write_report

    try:
        print(write_report(parser.parse_args().directory))
    except ValueError as error:
        parser.error(str(error))
