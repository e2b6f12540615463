"""Runs cases one after the other, each on fresh processes, and compares them with one rank's outcome.

    python -m tests.parity.worker DIRECTORY fork|spawn    reads cases.pickle there, writes results.json

fork: from this process, which has imported everything, so that a case starts in no time. spawn: on devices, since CUDA
cannot be used in a fork. A case leaves nothing behind, and if one of its ranks fails or hangs, only that case does.
"""

from __future__ import annotations

import json
import multiprocessing
import pickle
import sys
import tempfile
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from oreal_megatron.config import ObjectiveConfig
from oreal_megatron.distributed.cpu_backend import cpu_backend
from oreal_megatron.distributed.groups import parallel_groups
from tests.parity.layouts import ONE_RANK, Case
from tests.parity.oreal_step import NUM_STEPS, Outcome, differences, run_steps
from tests.ranks import start_ranks

SECONDS_A_CASE = 120


def main(directory: Path, method: str) -> None:
    processes = multiprocessing.get_context(method)
    cases, objective = pickle.loads((directory / "cases.pickle").read_bytes())
    expected: dict[tuple[bool, int], Outcome] = {}
    results: dict[str, Any] = {}
    for case in cases:
        data = case.tied, case.num_sequences
        if data not in expected:
            one = replace(ONE_RANK, tied=case.tied, num_sequences=case.num_sequences)
            (expected[data],) = on_processes(processes, one, objective)
        start = time.perf_counter()
        parts = answers_of(processes, case, objective, expected[data], directory)
        failures = [part for part in parts if isinstance(part, str)]
        results[case.name] = failures[0] if failures else {k: max(part[k] for part in parts) for k in parts[0]}
        (directory / "results.json").write_text(json.dumps(results))
        print(f"{case.name}  {time.perf_counter() - start:.1f} s", flush=True)


def answers_of(processes: Any, case: Case, objective: ObjectiveConfig, one: Outcome, directory: Path) -> list[Any]:
    """Each rank's differences from `one`, or the traceback of what went wrong."""
    if case.saved_by is None:
        return on_processes(processes, case, objective, one)
    with tempfile.TemporaryDirectory(dir=directory) as checkpoints:
        where: dict[str, Any] = {"checkpoints": Path(checkpoints) / "checkpoints"}
        saved = on_processes(processes, case.saved_by, objective, steps=range(1), **where)
        failures = [answer for answer in saved if isinstance(answer, str)]
        return failures or on_processes(processes, case, objective, one, steps=range(1, NUM_STEPS), **where)


def on_processes(
    processes: Any, case: Case, objective: ObjectiveConfig, one: Outcome | None = None, **options: Any
) -> list[Any]:
    """What each rank answers: its outcome, its differences from `one`, or the traceback of what went wrong.

    processes: a multiprocessing context. options: of `run_steps`.
    """
    pipes = [processes.Pipe(duplex=False) for _ in range(case.world)]
    senders = [sender for _, sender in pipes]
    ranks = start_ranks(case.world, run_rank, senders, case, objective, one, options, processes=processes)
    deadline = time.monotonic() + SECONDS_A_CASE
    answers = [
        pickle.loads(pipe.recv_bytes())
        if pipe.poll(max(deadline - time.monotonic(), 0))
        else f"no answer within {SECONDS_A_CASE} s"
        for pipe, _ in pipes
    ]
    for rank in ranks:
        rank.join(10)
        rank.kill()
    return answers


def run_rank(
    rank: int,
    pipes: list[Any],
    case: Case,
    objective: ObjectiveConfig,
    one: Outcome | None,
    options: dict[str, Any],
) -> None:
    answer: Any
    torch.set_num_threads(1)
    try:
        with cpu_backend(), parallel_groups(case.parallel, seed=0) as groups:
            outcome, parameters = run_steps(
                groups, objective, tied=case.tied, num_sequences=case.num_sequences, **options
            )
            answer = outcome if one is None else differences(outcome, parameters, one, groups)
            groups.barrier()
    except Exception:
        answer = traceback.format_exc()
    # As bytes: a pipe of objects would send tensors as handles to this process' memory.
    pipes[rank].send_bytes(pickle.dumps(answer))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
