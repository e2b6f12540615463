"""Ranks that need the same tensors of a checkpoint read each of them once, together."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import torch
from megatron.core.dist_checkpointing import ShardedTensor

from oreal_megatron.checkpoint.store import CheckpointStore
from oreal_megatron.config import ParallelConfig
from oreal_megatron.distributed.cpu_backend import cpu_backend
from oreal_megatron.distributed.groups import parallel_groups
from tests.ranks import run_ranks

RANKS = 4
LAYOUT = ParallelConfig(tensor=1, pipeline=1, micro_batch_tokens=64)
NUM_TENSORS, SIZE = 16, 250_000  # 1 MB each


def state(rank: int, value: float) -> dict[str, ShardedTensor]:
    """Tensors, fp32 [SIZE], that every rank has, filled with their number times `value`."""
    return {
        f"tensor_{number}": ShardedTensor.from_rank_offsets(
            f"tensor_{number}", torch.full((SIZE,), number * value), replica_id=rank
        )
        for number in range(NUM_TENSORS)
    }


def num_bytes_read() -> int:
    """Bytes that this process has read from files and pipes since its start."""
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


def saved_and_loaded(rank: int, directory: Path) -> None:
    with cpu_backend(), parallel_groups(LAYOUT, seed=0) as groups:
        store = CheckpointStore(directory, groups, keep=1)
        store.save("step_000001", state(rank, 1.0))
        before = num_bytes_read()
        loaded = store.load("step_000001", state(rank, 0.0))
        (directory / f"read_{rank}.json").write_text(json.dumps(num_bytes_read() - before))
        assert all((loaded[f"tensor_{number}"] == number).all() for number in range(NUM_TENSORS))


def test_data_parallel_ranks_read_a_checkpoint_once(tmp_path):
    run_ranks(RANKS, saved_and_loaded, tmp_path, processes=multiprocessing.get_context("spawn"))
    num_read = [json.loads((tmp_path / f"read_{rank}.json").read_text()) for rank in range(RANKS)]
    size = sum(path.stat().st_size for path in (tmp_path / "step_000001").glob("*.distcp"))
    assert size > 4 * NUM_TENSORS * SIZE
    assert sum(num_read) < 1.3 * size
    assert max(num_read) < 1.3 * size / RANKS
