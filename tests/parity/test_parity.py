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
import torch

from oreal_megatron.config import parse_config
from oreal_megatron.data.packing import Packer, Padding, SequenceCost
from tests.parity.layouts import (
    EVERY_MOVE,
    LAYOUTS,
    PACKED,
    SOME_MOVES,
    Case,
    covering_cases,
    every_case,
    moves,
    with_options,
)
from tests.parity.oreal_step import GEOMETRY, VOCABULARY, sequences

pytestmark = pytest.mark.distributed
ROOT = Path(__file__).resolve().parents[2]
TOLERANCES = {"metrics": 1e-5, "gradients": 1e-5, "weights": 1e-6, "generation": 2e-5}

Compare = Callable[..., dict[str, Any]]


@pytest.fixture
def compare(composed, tmp_path: Path) -> Compare:
    """Runs cases, each on processes of its own; by case their largest differences from one rank, or what went wrong."""

    def run(cases: Iterable[Case], method: str = "fork", *overrides: str) -> dict[str, Any]:
        objective = parse_config(composed("objective=oreal", "objective.beta=0.1", *overrides)).objective
        (tmp_path / "cases.pickle").write_bytes(pickle.dumps((list(cases), objective)))
        command = [sys.executable, "-m", "tests.parity.worker", str(tmp_path), method]
        subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
        return json.loads((tmp_path / "results.json").read_text())

    return run


def beyond_tolerance(results: dict[str, Any], factor: float = 1.0) -> list[str]:
    """Returns what went wrong, and differences of more than `factor` times the tolerances."""
    failures = [f"{case}: {found}" for case, found in results.items() if isinstance(found, str)]
    return failures + [
        f"{case}: {kind} differ by {difference:.1e} (at most {factor * TOLERANCES[kind]:.0e}): {where}"
        for case, found in results.items()
        if not isinstance(found, str)
        for kind, (difference, where) in found.items()
        if not difference <= factor * TOLERANCES[kind]
    ]


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_rows_of_the_layouts_share_prompts(num_ranks: int) -> None:
    """Otherwise the other tests would say nothing of shared prompts."""
    rows = [
        row
        for rank in range(num_ranks)
        for row in Packer(
            num_ranks=num_ranks,
            rank=rank,
            token_budget=PACKED,
            count_multiple=1,
            padding=Padding(),
            cost=SequenceCost.of_model(GEOMETRY, VOCABULARY),
            device=torch.device("cpu"),
            shares_prompts=True,
        ).batches(sequences(7))
    ]
    assert any(end > start for row in rows for start, end in row.prefixes)


@pytest.mark.parametrize("world", [2, 4])
def test_layouts_give_the_numbers_of_one_rank(compare: Compare, world: int) -> None:
    results = compare(covering_cases(world))
    assert len(results) >= 15 and not beyond_tolerance(results)


def test_layouts_split_into_the_same_minibatches(compare: Compare) -> None:
    """Two epochs of three mini-batches, of one to three sequences; with two ranks of data one rank may have none."""
    terms = ("positive_term=ratio", "negative_term=ratio", "clip=0.2", "importance_limit=2.0")
    updates = "objective.updates={epochs: 2, minibatches: 3}"
    cases = [Case(name, 2, layout) for name, layout in LAYOUTS[2].items()]
    cases.append(with_options(Case("DP2", 2, LAYOUTS[2]["DP2"], num_sequences=5), "distopt", "overlap"))
    results = compare(cases, "fork", updates, *(f"objective.{term}" for term in terms))
    # Each of six updates of a step carries the rounding of those before it on; the tolerances are those of one.
    assert len(results) == len(LAYOUTS[2]) + 1 and not beyond_tolerance(results, factor=6.0)


def test_a_checkpoint_goes_on_in_another_layout_as_one_rank_does(compare: Compare) -> None:
    results = compare(moves(SOME_MOVES))
    assert len(results) == len(SOME_MOVES) and not beyond_tolerance(results)


def test_ranks_are_spawned_as_on_devices(compare: Compare) -> None:
    results = compare([Case("DP2", 2, LAYOUTS[2]["DP2"])], "spawn")
    assert len(results) == 1 and not beyond_tolerance(results)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(("world", "number"), [(2, 200), (4, 500), (8, 12)])
def test_every_combination_gives_the_numbers_of_one_rank(compare: Compare, world: int, number: int) -> None:
    results = compare(every_case(world))
    assert len(results) >= number and not beyond_tolerance(results)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_move_goes_on_as_one_rank_does(compare: Compare) -> None:
    results = compare(moves(EVERY_MOVE))
    assert len(results) == len(EVERY_MOVE) and not beyond_tolerance(results)
