"""The planner's memory against measured peaks: each rank's resident memory in each phase, above that after the imports.

    python -m benchmarks.memory [--layouts NAME ...]

What the ranks do is in memory_rank.py. glibc is told to hand large blocks back at once, since what it keeps for later
is nobody's memory.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys

from oreal_megatron.compose import composed, resolved
from oreal_megatron.config import TrainConfig, parse_config
from oreal_megatron.distributed.environment import NO_DEVICES
from oreal_megatron.planner.hardware import FULL
from oreal_megatron.planner.memory import PHASES

ROW = 1024
MODEL = (
    "model.geometry.num_layers=8 model.geometry.hidden_size=512 model.geometry.ffn_hidden_size=1536 "
    "model.geometry.num_attention_heads=8 model.geometry.num_query_groups=4 model.geometry.vocab_size=16384 "
    f"model.max_sequence_length={ROW} model.logprob_chunk_tokens=256 parallel.micro_batch_tokens={ROW} "
    "objective.actor_freeze_steps=0 run.name=memory rollout.batch_size=64 rollout.sampling.max_new_tokens=16"
).split()
# name -> (processes, overrides)
LAYOUTS: dict[str, tuple[int, str]] = {
    "one rank": (1, ""),
    "selective recompute": (1, "parallel.recompute=selective"),
    "full recompute": (1, "parallel.recompute=full"),
    "rows of 512": (1, "parallel.micro_batch_tokens=512 model.max_sequence_length=512"),
    "TP2": (2, "parallel.tensor=2"),
    "TP2, SP": (2, "parallel.tensor=2 parallel.sequence=true"),
    "PP2": (2, "parallel.pipeline=2"),
    "PP2, full recompute": (2, "parallel.pipeline=2 parallel.recompute=full"),
    "DP2": (2, ""),
    "DP2, distributed optimizer": (2, "parallel.distributed_optimizer=true"),
    "CP2": (2, "parallel.context=2"),
}
# What is sent to servers is planned where there are some.
SERVERS = ("rollout=sglang_cpu", "rollout.sglang.bucket_mib=64")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", nargs="*", default=list(LAYOUTS), choices=list(LAYOUTS), metavar="NAME")
    arguments = parser.parse_args()
    print(f"{'layout':28}{'phase':20}{'measured':>10}{'planned':>10}{'error':>8}   MiB of the fullest rank")
    errors, overrun = [], 0
    for name in arguments.layouts:
        measured, planned = measure(name), plan(name)
        for phase in PHASES:
            error = planned[phase] / measured[phase] - 1
            errors.append(error)
            # On a device of just less than the measured size it would run out: the plan has to refuse that device.
            overrun += planned[phase] <= FULL * measured[phase]
            print(f"{name:28}{phase:20}{measured[phase]:10.0f}{planned[phase]:10.0f}{error:+8.1%}", flush=True)
    print(f"{len(errors)} figures: {min(errors):+.1%} to {max(errors):+.1%} (aim: within 15%)")
    print(f"accepted for a device on which it would run out: {overrun}")


def configuration(name: str, *more: str) -> TrainConfig:
    processes, overrides = LAYOUTS[name]
    layout = (f"resources.trainer_devices={processes}", *overrides.split())
    return parse_config(resolved(composed(["experiment=arithmetic", *more, *MODEL, *layout])))


def plan(name: str) -> dict[str, float]:
    """MiB by phase: the fullest stage."""
    from oreal_megatron.cli.planning import planner_of

    planned: dict[str, float] = {}
    for config in (configuration(name), configuration(name, *SERVERS)):
        memories = planner_of(config)(config).memory.phases
        trainers = [memory for memory in memories if memory.where != "server"]
        for phase in {memory.phase for memory in trainers} - planned.keys():
            planned[phase] = max(memory.total for memory in trainers if memory.phase == phase) / 2**20
    return planned


def measure(name: str) -> dict[str, float]:
    """MiB by phase: the fullest rank."""
    processes, _ = LAYOUTS[name]
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    outcome = subprocess.run(
        [sys.executable, *command, "-m", "benchmarks.memory_rank", name],
        capture_output=True,
        text=True,
        env=os.environ
        | NO_DEVICES
        | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
    )
    lines = [line.split("MEASURED ", 1)[1] for line in outcome.stdout.splitlines() if "MEASURED " in line]
    if len(lines) != processes:
        raise RuntimeError(f"{name}: {outcome.stderr[-3000:]}")
    ranks = [json.loads(line) for line in lines]
    return {phase: max(rank[phase] for rank in ranks) for phase in PHASES}


if __name__ == "__main__":
    main()
