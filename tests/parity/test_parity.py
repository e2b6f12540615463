"""Every layout gives one rank's losses, gradients and updated weights, through Megatron's own schedules over gloo.

fp32; losses, norms and gradients within 1e-5 relative, updated weights within 1e-6 at AdamW's epsilon of 1e-4; and
what the updated policy generates with, within 2e-5 nats.
"""

from __future__ import annotations

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
from tests.parity.layouts import Case, covering_cases, every_case

pytestmark = pytest.mark.distributed
ROOT = Path(__file__).resolve().parents[2]
TOLERANCES = {"metrics": 1e-5, "gradients": 1e-5, "weights": 1e-6, "generation": 2e-5}

Compare = Callable[[int, Iterable[Case]], dict[str, Any]]


@pytest.fixture
def compare(composed, tmp_path: Path) -> Compare:
    """Runs cases on so many processes; by case their largest differences from one rank, or what went wrong."""

    def run(world: int, cases: Iterable[Case]) -> dict[str, Any]:
        objective = parse_config(composed("objective=oreal", "objective.beta=0.1")).objective
        (tmp_path / "cases.pickle").write_bytes(pickle.dumps((world, list(cases), objective)))
        command = [sys.executable, "-m", "tests.parity.worker", str(tmp_path)]
        subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
        return json.loads((tmp_path / "results.json").read_text())

    return run


def beyond_tolerance(results: dict[str, Any]) -> list[str]:
    failures = [f"{case}: {found}" for case, found in results.items() if isinstance(found, str)]
    return failures + [
        f"{case}: {kind} differ by {difference:.1e} (at most {TOLERANCES[kind]:.0e}): {where}"
        for case, found in results.items()
        if not isinstance(found, str)
        for kind, (difference, where) in found.items()
        if not difference <= TOLERANCES[kind]
    ]


@pytest.mark.parametrize("world", [2, 4])
def test_layouts_give_the_numbers_of_one_rank(compare: Compare, world: int) -> None:
    results = compare(world, covering_cases(world))
    assert len(results) >= 15 and not beyond_tolerance(results)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("world", [2, 4])
def test_every_combination_gives_the_numbers_of_one_rank(compare: Compare, world: int) -> None:
    results = compare(world, every_case(world))
    assert len(results) >= 200 and not beyond_tolerance(results)
