"""Argument parsers of the commands."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from oreal_megatron import __version__

VERSION = f"oreal_megatron {__version__}"
"""Text that --version shows."""


def command_parser(name: str, description: str, *, example: str) -> argparse.ArgumentParser:
    """Returns a parser with --help, which ends with the example, and --version."""
    parser = argparse.ArgumentParser(
        prog=name,
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=VERSION)
    return parser


def add_subcommand(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    run: Callable[[argparse.Namespace], int],
    summary: str,
    details: str,
    *,
    example: str,
) -> argparse.ArgumentParser:
    """Adds a sub-command, whose --help ends with the example, and returns its parser. run: gives its exit status."""
    command = commands.add_parser(
        name,
        help=summary,
        description=f"{summary}\n\n{details}",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=run)
    return command


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Adds the overrides of the configuration as positional arguments, `overrides`, and --config-dir."""
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides, as for oreal-train")
    parser.add_argument(
        "--config-dir", type=Path, metavar="DIR", help="directory with more options of groups, as for oreal-train"
    )


def positive(text: str) -> int:
    """Returns the number that an argument names, or refuses the argument if it is below 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return value
