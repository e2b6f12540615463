"""Arguments, progress and reports that the sub-commands of `oreal-data` share."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from rich.bar import Bar
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from oreal_megatron.data.curation.report import Report
from oreal_megatron.data.mapping import Source, expression


def add_output(command: argparse.ArgumentParser, *, required: bool, help: str = "JSONL file to write") -> None:
    """Adds --output, the file that the sub-command writes, and --json."""
    command.add_argument("--output", type=Path, required=required, metavar="FILE", help=help)
    command.add_argument("--json", action="store_true", help="print the report as JSON")


def share(text: str) -> float:
    """Returns the number that an argument names, or refuses it if it is not above 0 and at most 1."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return value


def rate(text: str) -> float:
    """Returns the pass rate that an argument names, or refuses it if it is not in [0, 1]."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1]")
    return value


def expression_argument(text: str) -> Source:
    """Returns the JMESPath expression that an argument is, or refuses it."""
    try:
        expression(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return Source(path=text)


@contextlib.contextmanager
def progress_bar(title: str, total: int) -> Iterator[Callable[[], None]]:
    """Shows a bar of records on stderr, and gives the function that advances it by one."""
    console = Console(stderr=True)
    with Progress(*Progress.get_default_columns(), console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=total)
        yield lambda: progress.advance(task)


def show(report: Report, arguments: argparse.Namespace, *, title: str) -> None:
    """Prints the report as a table with its examples, or as JSON."""
    if arguments.json:
        print(json.dumps(report.as_json(), ensure_ascii=False, indent=2))
        return
    table = Table("lines", "what", title=title, title_justify="left")
    for kind, count in report.counts.most_common():
        table.add_row(f"{count:,}", kind)
    console = Console(markup=False, highlight=False, soft_wrap=True)
    console.print(table)
    for name, counts in report.tables.items():
        console.print(_bars(name, counts))
    for example in report.examples:
        console.print(f"{example.where}: {example.kind}: {' '.join(example.text.split())[:200]}")
    if arguments.output is not None:
        console.print(f"written: {arguments.output}")


def _bars(name: str, counts: Mapping[str, int]) -> Table:
    """Returns a table with a bar for each value."""
    table = Table(name, "lines", "")
    most = max([*counts.values(), 1])
    for value, count in counts.items():
        table.add_row(value.replace("_to_", " to "), f"{count:,}", Bar(most, 0, count, width=30))
    return table
