"""Objects and waits go through host memory, whatever the collectives of tensors do."""

from __future__ import annotations

import multiprocessing
from unittest import mock

import torch
import torch.distributed as dist
from torch.testing._internal.distributed import fake_pg  # noqa: F401 (registers the backend)

from oreal_megatron.config import ParallelConfig
from oreal_megatron.distributed import groups as module
from oreal_megatron.distributed.cpu_backend import cpu_backend
from oreal_megatron.distributed.groups import parallel_groups
from tests.ranks import run_ranks

LAYOUT = ParallelConfig(tensor=1, pipeline=2, micro_batch_tokens=64)


def without_tensor_collectives(rank: int) -> None:
    # Collectives of the fake backend return at once and move nothing, so only other groups can deliver an object.
    with (
        mock.patch.object(module, "collective_backend", lambda: "fake"),
        cpu_backend(),
        parallel_groups(LAYOUT, seed=0) as groups,
    ):
        for scope, same in (("pipeline", groups.collection.pp), ("data", groups.collection.dp)):
            assert dist.get_process_group_ranks(groups.host[scope]) == dist.get_process_group_ranks(same)
        replica = sorted(2 * groups.pipeline_rank + groups.data_rank for _ in range(1))
        assert replica == [rank]
        assert groups.from_main(rank) == 0
        assert groups.from_replica_leader(rank) == groups.data_rank
        assert groups.from_last_stage(["last", torch.ones(2)] if groups.is_last_stage else None)[0] == "last"
        assert groups.gather_over_world([rank]) == [[0], [1], [2], [3]]
        assert groups.gather_over_data([rank]) == [[2 * groups.pipeline_rank], [2 * groups.pipeline_rank + 1]]
        assert groups.any_rank(rank == 3) and not groups.any_rank(False)
        assert groups.any_of_replica(rank == 3) == (groups.data_rank == 1)
        first_stage = groups.pipeline_rank == 0
        mine = groups.gather_to_main({"rank": rank} if first_stage else None)
        assert mine == ([{"rank": 0}, {"rank": 1}] if groups.is_main else [])
        assert groups.scatter_from_main(["a", "b"] if groups.is_main else None) == "ab"[groups.data_rank]
        groups.barrier()


def test_objects_arrive_without_collectives_of_tensors():
    # Not forked: this process may have process groups.
    run_ranks(4, without_tensor_collectives, processes=multiprocessing.get_context("spawn"))
