"""The worker processes: limits, restarts, and that none survives."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from oreal_megatron.stopping import SIGNALS
from oreal_megatron.types import Verdict
from oreal_megatron.verifier import VerifierConfig, build_verifier
from oreal_megatron.verifier.workers.pool import WorkerPool

from .labelled import pair

ROOT = Path(__file__).resolve().parents[3]
SURD = ("\\sqrt{2}", ("\\frac{2}{\\sqrt{2}}",), ())


def is_alive(process: int) -> bool:
    """Alive and no zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return condition()


def test_a_hanging_worker_is_killed_and_the_others_are_unharmed() -> None:
    pool = WorkerPool(num_workers=2, timeout_seconds=1.0, memory_limit_mb=512)
    try:
        assert pool.compare([SURD, SURD])[0].outcome.verdict is Verdict.CORRECT
        hanging = pool.processes()[1]
        os.kill(hanging, signal.SIGSTOP)
        started = time.monotonic()
        results = pool.compare([SURD] * 20)
        verdicts = [result.outcome.verdict for result in results]
        assert verdicts.count(Verdict.UNDECIDED) == 1
        assert verdicts.count(Verdict.CORRECT) == 19
        assert [result.timed_out for result in results].count(True) == 1
        assert time.monotonic() - started < 2.0
        assert pool.num_restarts == 1
        assert not is_alive(hanging)
        assert [r.outcome.verdict for r in pool.compare([SURD] * 4)] == [Verdict.CORRECT] * 4
    finally:
        pool.close()


@pytest.mark.parametrize("victim", [0, 1], ids=["server", "worker"])
def test_a_killed_process_is_replaced(victim: int) -> None:
    pool = WorkerPool(num_workers=1, timeout_seconds=10.0, memory_limit_mb=512)
    try:
        pool.compare([SURD])
        processes = pool.processes()
        os.kill(processes[victim], signal.SIGKILL)
        assert wait_until(lambda: not is_alive(processes[1]) or victim == 1)
        results = pool.compare([SURD] * 3)
        assert all(r.outcome.verdict in (Verdict.CORRECT, Verdict.UNDECIDED) for r in results)
        assert results[-1].outcome.verdict is Verdict.CORRECT
        assert not any(map(is_alive, {processes[victim], processes[1]}))
    finally:
        pool.close()


@pytest.mark.parametrize("number", SIGNALS)
def test_a_schedulers_signal_to_all_processes_loses_no_comparison(number: signal.Signals) -> None:
    pool = WorkerPool(num_workers=1, timeout_seconds=60.0, memory_limit_mb=512)
    try:
        pool.compare([SURD])
        processes = pool.processes()
        for process in processes:
            os.kill(process, number)
        assert [result.outcome.verdict for result in pool.compare([SURD] * 3)] == [Verdict.CORRECT] * 3
        assert (pool.processes(), pool.num_restarts) == (processes, 0)
    finally:
        pool.close()
    assert not any(map(is_alive, processes))


def test_memory_is_limited() -> None:
    """Twenty thousand digits to the power of twenty thousand would be 1.3 GB; it is refused, or runs out, in time."""
    with build_verifier(VerifierConfig(num_workers=1, memory_limit_mb=256, timeout_seconds=5.0)) as verifier:
        bomb = "(" + "9" * 300 + ")^{19999}"
        grades = verifier.grade_answers([pair("x+1", bomb), pair("\\sqrt{2}", "2^{1/2}")])
    assert grades[0].verdict is not Verdict.CORRECT
    assert grades[1].verdict is Verdict.CORRECT


def test_close_and_garbage_collection_leave_no_process() -> None:
    pool = WorkerPool(num_workers=2, timeout_seconds=5.0, memory_limit_mb=512)
    pool.compare([SURD, SURD])
    processes = pool.processes()
    pool.close()
    assert wait_until(lambda: not any(map(is_alive, processes)))
    pool.compare([SURD, SURD])  # a closed pool starts anew
    processes = pool.processes()
    del pool
    gc.collect()
    assert wait_until(lambda: not any(map(is_alive, processes)))


def test_kill_of_the_parent_leaves_no_process(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent(
            """
            import os, signal, sys, time
            from oreal_megatron.verifier.workers.pool import WorkerPool
            pool = WorkerPool(num_workers=2, timeout_seconds=60.0, memory_limit_mb=512)
            job = ("\\\\sqrt{2}", ("2^{1/2}",), ())
            pool.compare([job, job])
            os.kill(pool.processes()[1], signal.SIGSTOP)  # as a worker that is deep in a bomb
            print(*pool.processes(), flush=True)
            time.sleep(60)
            """
        )
    )
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment)
    assert parent.stdout is not None
    processes = [int(word) for word in parent.stdout.readline().split()]
    assert len(processes) == 3 and all(map(is_alive, processes))
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert wait_until(lambda: not any(map(is_alive, processes)))


def test_the_fast_path_starts_no_process() -> None:
    with build_verifier(VerifierConfig(num_workers=1)) as verifier:
        grades = verifier.grade_answers([pair(str(number), f"{number}.0") for number in range(1_000)])
        assert all(grade.verdict is Verdict.CORRECT for grade in grades)
        assert verifier.processes() == []
        assert sum(grade.seconds for grade in grades) < 1.0


def test_workers_are_no_forks_of_this_process() -> None:
    """The server is a fresh interpreter: nothing of the trainer's threads, devices or modules is in it."""
    marker = os.environ["OREAL_TEST_MARKER"] = "set after the start of this process"
    pool = WorkerPool(num_workers=1, timeout_seconds=10.0, memory_limit_mb=512)
    try:
        pool.compare([SURD])
        for process in pool.processes():
            command = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
            assert b"oreal_megatron.verifier.workers.worker" in command
            assert len(list(Path(f"/proc/{process}/task").iterdir())) == 1
    finally:
        pool.close()
        assert os.environ.pop("OREAL_TEST_MARKER") == marker


def test_import_needs_neither_torch_nor_sympy() -> None:
    """The trainer imports the verifier's config on every rank; sympy belongs to the workers."""
    heavy = "('torch', 'sympy', 'httpx', 'antlr4')"
    code = f"import sys, oreal_megatron.verifier; print([name for name in {heavy} if name in sys.modules])"
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert result.stdout.strip() == "[]"
