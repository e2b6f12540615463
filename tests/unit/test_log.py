"""A run's log: the main rank on the console, every rank in a file of its own."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings

import pytest
import torch
from rich.console import Console

from oreal_megatron.log import quiet_libraries, run_logging

LINE = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d rank %d %s "


def log_two_lines(directory, rank, console):
    logger = logging.getLogger("oreal_megatron.train")
    with run_logging(directory, rank=rank, level="INFO", console=console):
        logger.debug("not shown")
        logger.info("pip install '.[sglang]'")
        logger.warning("careful")


def test_main_rank_lines_have_time_rank_and_level_and_keep_brackets(tmp_path):
    shown = io.StringIO()
    log_two_lines(tmp_path, 0, Console(file=shown, width=200))
    lines = shown.getvalue().splitlines()
    assert re.fullmatch(LINE % (0, "INFO") + r"pip install '\.\[sglang\]'", lines[0].rstrip()), lines
    assert re.fullmatch(LINE % (0, "WARNING") + "careful", lines[1].rstrip()), lines
    assert len(lines) == 2


@pytest.mark.parametrize("rank", [0, 3])
def test_every_rank_appends_to_its_own_file(tmp_path, rank):
    for _ in range(2):  # a resumed run goes on in the same file
        log_two_lines(tmp_path, rank, None)
    lines = (tmp_path / "logs" / f"rank_{rank:04d}.log").read_text().splitlines()
    assert len(lines) == 4
    assert re.fullmatch(LINE % (rank, "WARNING") + "oreal_megatron.train: careful", lines[1]), lines


def test_calls_that_newer_torches_deprecate_are_not_the_users():
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        quiet_libraries()
        with contextlib.suppress(ValueError):  # another test of the process may have made a group, or not
            torch.distributed.reduce_scatter_tensor(torch.zeros(1), torch.zeros(1))  # as Megatron-Core does
    assert not shown
