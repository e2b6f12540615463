"""Fake process groups: one process builds and computes as any rank of any layout, without the other ranks.

On torch's `fake` process group every collective returns at once and leaves its output as it is. With fake tensors,
which have shapes and no data, this takes no memory either.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import random as megatron_random
from torch.testing._internal.distributed.fake_pg import FakeStore

from oreal_megatron.config import ParallelConfig
from oreal_megatron.distributed.groups import ParallelGroups, split_processes


@contextlib.contextmanager
def fake_groups(config: ParallelConfig, *, rank: int, world: int) -> Iterator[ParallelGroups]:
    """Yields the groups that `parallel_groups` yields on rank `rank` of `world` processes.

    No process group may exist when the block is entered.
    """
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    # Megatron-Core saves, compares and restores generator states at each layer; fake states have no values.
    no_generators: list[Any] = [
        mock.patch.object(megatron_random.CudaRNGStatesTracker, "fork", lambda *args: contextlib.nullcontext()),
        mock.patch.object(megatron_random, "_set_cuda_rng_state", lambda *args, **kwargs: None),
        mock.patch.object(torch, "set_rng_state", lambda state: None),
    ]
    try:
        groups = split_processes(config, seed=0, host_backend="fake", create_gloo_process_groups=False)
        with contextlib.ExitStack() as stack:
            for patch in no_generators:
                stack.enter_context(patch)
            yield groups
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
