"""Every layout gives one rank's losses, gradients and updated weights, through Megatron's own schedules over gloo.

fp32; losses, norms and gradients within 1e-5 relative, updated weights within 1e-6 at AdamW's epsilon of 1e-4.
"""

from __future__ import annotations

import functools
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from oreal_megatron.config import parse_config
from oreal_megatron.parallel.groups import ParallelGroups
from tests.parity.layouts import Case, covering_cases, every_case
from tests.parity.oreal_step import run_steps

pytestmark = pytest.mark.distributed
ROOT = Path(__file__).resolve().parents[2]
TOLERANCES = {"metrics": 1e-5, "gradients": 1e-5, "weights": 1e-6}

Compare = Callable[[int, Iterable[Case]], dict[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def compare(composed, single_process: ParallelGroups, tmp_path_factory) -> Compare:
    """Runs cases on so many processes; their largest differences from one rank by case."""
    objective = parse_config(composed("objective=oreal", "objective.beta=0.1")).objective

    @functools.cache
    def one_rank(tied: bool, num_sequences: int) -> Any:
        return run_steps(single_process, objective, tied=tied, num_sequences=num_sequences)[0]

    def run(world: int, cases: Iterable[Case]) -> dict[str, dict[str, Any]]:
        cases = list(cases)
        directory = tmp_path_factory.mktemp("parity")
        expected = {(c.tied, c.num_sequences): one_rank(c.tied, c.num_sequences) for c in cases}
        (directory / "cases.pickle").write_bytes(pickle.dumps((cases, objective, expected)))
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
        outcome = subprocess.run(
            [sys.executable, *launcher, "-m", "tests.parity.worker", str(directory)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        failed = "\n".join(path.read_text() for path in directory.glob("failed_*.txt"))
        assert outcome.returncode == 0, failed or outcome.stderr
        return json.loads((directory / "results.json").read_text())

    return run


def beyond_tolerance(results: dict[str, dict[str, Any]]) -> list[str]:
    return [
        f"{case}: {kind} differ by {difference:.1e} (at most {TOLERANCES[kind]:.0e}): {where}"
        for case, found in results.items()
        for kind, (difference, where) in found.items()
        if not difference <= TOLERANCES[kind]
    ]


@pytest.mark.parametrize("world", [2, 4])
def test_layouts_give_the_numbers_of_one_rank(compare: Compare, world: int) -> None:
    results = compare(world, covering_cases(world))
    assert len(results) >= 14 and not beyond_tolerance(results)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("world", [2, 4])
def test_every_combination_gives_the_numbers_of_one_rank(compare: Compare, world: int) -> None:
    results = compare(world, every_case(world))
    assert len(results) >= 300 and not beyond_tolerance(results)
