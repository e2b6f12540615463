"""Runs that signals stop or kill at random instants end as the run that nothing interrupted."""

from __future__ import annotations

import contextlib
import itertools
import random
import shutil
import signal
import time
from collections import Counter, deque
from pathlib import Path

import psutil
import pytest

from tests.end_to_end.test_kills import UNITS, assert_same_run
from tests.run_processes import RunProcess, start_ranks

pytestmark = pytest.mark.end_to_end

STEPS = 6
RUN = (*UNITS, f"run.num_steps={STEPS}", "run.checkpoint_every=1", "run.async_checkpoints=true", "run.export=best")
COLD = ("sft.steps=100", "data.pass_rate={samples: 2, max_prompts: null}")  # with a warm start and pass rates
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGKILL)
IS_LIVE = "rank 0 INFO"
"""Part of the first line that a run logs; from then on it handles signals."""
# Ranks, further overrides, interruptions.
CONFIGURATIONS = {"one rank": (1, (), 40), "one rank, cold": (1, COLD, 24), "two ranks": (2, (), 24)}


def interrupt(ranks: list[RunProcess], number: signal.Signals, rng: random.Random, longest: float) -> str:
    """Sends a signal at a random instant of a run's life; returns which processes got it."""
    ranks[0].wait_until(lambda: IS_LIVE in ranks[0].said())
    time.sleep(rng.uniform(0, longest))
    to = rng.choice(["one process", "every group", "every process"])
    # A rank that is killed alone ends the others with an error: tests/distributed/test_dying_rank.py.
    chosen = [rng.choice(ranks)] if to == "one process" and number != signal.SIGKILL else ranks
    for rank in chosen:
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            if to == "every process":  # as SLURM signals a step
                for process in psutil.Process(rank.pid).children(recursive=True):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.send_signal(number)
            rank.signal(number, with_children=to == "every group")
    return to


def check_statuses(statuses: set[int], number: signal.Signals | None, said: str) -> None:
    if number == signal.SIGKILL:
        assert statuses <= {-signal.SIGKILL, 0}, (statuses, said)
    elif number is not None:
        assert statuses in ({75}, {0}), (number, statuses, said)
    else:
        assert statuses == {0}, said
    assert "Traceback" not in said, said


def interrupted(directory: Path, overrides, num_ranks: int, left: deque, rng, longest: float) -> Counter:
    """Starts a run again and again, each time with the next signal of `left`, until it ends; counts interruptions.

    A signal that came when the run had done its work stays in `left`.
    """
    made: Counter = Counter()
    while True:
        number = left[0] if left else None
        ranks = start_ranks(directory, *overrides, num_processes=num_ranks)
        to = interrupt(ranks, number, rng, longest) if number is not None else ""
        statuses = {rank.wait() for rank in ranks}
        check_statuses(statuses, number, ranks[0].said())
        if statuses == {0}:
            return made
        left.popleft()
        made[f"{number.name} to {to}"] += 1


def assert_same_export(directory: Path, whole: Path) -> None:
    def exported(run: Path) -> dict[str, bytes]:
        best = run / "huggingface/best"
        return {str(p.relative_to(best)): p.read_bytes() for p in best.rglob("*") if p.is_file()}

    mine, expected = exported(directory), exported(whole)
    assert mine.keys() == expected.keys() and any(name.endswith(".safetensors") for name in expected)
    assert [name for name in expected if mine[name] != expected[name]] == []


def check(make, num_ranks: int, overrides, num_interruptions: int, seed: int, share: float) -> Counter:
    """Interrupts runs so often in all. share: latest instant of an interruption, as a part of a whole run's time."""
    overrides = (*RUN, *overrides)
    whole, rng = make("whole"), random.Random(seed)
    ranks = start_ranks(whole, *overrides, num_processes=num_ranks)
    assert ranks[0].wait_until(lambda: IS_LIVE in ranks[0].said())
    start = time.monotonic()
    check_statuses({rank.wait() for rank in ranks}, None, ranks[0].said())
    longest = share * (time.monotonic() - start)
    order = itertools.cycle(rng.sample(SIGNALS, len(SIGNALS)))
    left = deque(itertools.islice(order, num_interruptions))
    made: Counter = Counter()
    for trial in itertools.count():
        directory = make(f"trial_{trial}")
        made += interrupted(directory, overrides, num_ranks, left, rng, longest)
        assert_same_run(directory, whole, STEPS)
        assert_same_export(directory, whole)
        if not left:
            return made
        shutil.rmtree(directory)
    raise AssertionError


def test_every_signal_once_at_a_random_instant_changes_nothing(warm, single_process):
    made = check(warm, 1, (), 4, seed=3, share=0.25)
    assert {name.split()[0] for name in made} == {number.name for number in SIGNALS}, made


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_signals_at_random_instants_change_nothing(warm, tmp_path, single_process, configuration):
    num_ranks, overrides, num_interruptions = CONFIGURATIONS[configuration]
    make = (lambda name: tmp_path / name) if overrides else warm
    made = check(make, num_ranks, overrides, num_interruptions, seed=num_interruptions, share=0.7)
    print(configuration, dict(sorted(made.items())))
