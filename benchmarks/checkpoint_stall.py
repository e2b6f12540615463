"""How long training stands still for a checkpoint: written behind the next steps, against waited for.

python -m benchmarks.checkpoint_stall [--pairs 5]

The snapshot is what stalls: a copy to the host on a GPU, a fork (copy on write) on a CPU. The writing is the rest.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
from pathlib import Path

from benchmarks.model import policy_of, trained
from benchmarks.pairs import seconds
from oreal_megatron.checkpoint.state import trained_state
from oreal_megatron.checkpoint.store import CheckpointStore, step_name
from oreal_megatron.config import ParallelConfig
from oreal_megatron.distributed.cpu_backend import cpu_backend
from oreal_megatron.distributed.groups import parallel_groups


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--directory", type=Path, help="where to write; default: a temporary directory")
    arguments = parser.parse_args()
    layout = ParallelConfig(tensor=1, pipeline=1, micro_batch_tokens=1)
    with (
        tempfile.TemporaryDirectory(dir=arguments.directory) as directory,
        cpu_backend(),
        parallel_groups(layout, seed=0) as groups,
    ):
        model = trained(policy_of(groups), groups)
        store = CheckpointStore(Path(directory), groups, keep=1)
        steps = itertools.count()

        def save(*, wait: bool) -> float:
            """Seconds that the trainer stands still; what goes on behind it is waited for outside."""
            stall = seconds(lambda: store.save(step_name(next(steps)), trained_state("policy", model), wait=wait))
            store.finish(wait=True)
            return stall

        save(wait=False), save(wait=True)
        times = [(save(wait=False), save(wait=True)) for _ in range(arguments.pairs)]
        size = sum(path.stat().st_size for path in Path(directory).rglob("*")) / 2**20
    behind, waited = (statistics.median(column) for column in zip(*times, strict=True))
    ratio = statistics.median(a / b for a, b in times)
    print(f"one model with its optimizer, {size:.0f} MiB")
    print(f"stall, written behind the next steps  {behind:.3f} s\nstall, waited for                     {waited:.3f} s")
    print(f"async stalls {ratio:.2f} x as long as sync (median of {arguments.pairs} pairs)")


if __name__ == "__main__":
    main()
