"""Runs cases one after the other, each on fresh processes, and compares them with one rank's outcome.

    python -m tests.parity.worker DIRECTORY    reads cases.pickle there, writes results.json

Processes are forked from this one, which has imported everything: a case starts in no time, leaves nothing
behind, and if one of its ranks fails or hangs, only that case does.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from oreal_megatron.config import ObjectiveConfig
from oreal_megatron.parallel.device import device_seam
from oreal_megatron.parallel.groups import parallel_groups
from tests.parity.layouts import ONE_RANK, Case
from tests.parity.oreal_step import Outcome, differences, run_steps

FORK = multiprocessing.get_context("fork")
SECONDS_A_CASE = 120


def main(directory: Path) -> None:
    torch.set_num_threads(1)
    world, cases, objective = pickle.loads((directory / "cases.pickle").read_bytes())
    expected: dict[tuple[bool, int], Outcome] = {}
    results: dict[str, Any] = {}
    for case in cases:
        data = case.tied, case.num_sequences
        if data not in expected:
            (expected[data],) = on_processes(1, Case("one", ONE_RANK, tied=case.tied, num_sequences=data[1]), objective)
        start = time.perf_counter()
        parts = on_processes(world, case, objective, expected[data])
        failures = [part for part in parts if isinstance(part, str)]
        results[case.name] = failures[0] if failures else {k: max(part[k] for part in parts) for k in parts[0]}
        (directory / "results.json").write_text(json.dumps(results))
        print(f"{case.name}  {time.perf_counter() - start:.1f} s", flush=True)


def on_processes(world: int, case: Case, objective: ObjectiveConfig, one: Outcome | None = None) -> list[Any]:
    """What each rank answers: its outcome, its differences from `one`, or the traceback of what went wrong."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes = [FORK.Pipe(duplex=False) for _ in range(world)]
    ranks = [
        FORK.Process(target=run_rank, args=(pipe, rank, world, port, case, objective, one))
        for rank, (_, pipe) in enumerate(pipes)
    ]
    for rank in ranks:
        rank.start()
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
    pipe: Any, rank: int, world: int, port: int, case: Case, objective: ObjectiveConfig, one: Outcome | None
) -> None:
    where = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in where.items()}
    answer: Any
    try:
        with device_seam(), parallel_groups(case.parallel, seed=0) as groups:
            outcome, parameters = run_steps(groups, objective, tied=case.tied, num_sequences=case.num_sequences)
            answer = outcome if one is None else differences(outcome, parameters, one, groups)
            groups.barrier()
    except Exception:
        answer = traceback.format_exc()
    # As bytes: a pipe of objects would send tensors as handles to this process' memory.
    pipe.send_bytes(pickle.dumps(answer))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
