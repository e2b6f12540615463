"""Process groups of one model layout, made once and passed to whoever needs them."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection

from oreal_megatron.config import ParallelConfig
from oreal_megatron.parallel.device import collective_backend, device

T = TypeVar("T")


@dataclass(frozen=True)
class ParallelGroups:
    """Where this process stands: the layout, Megatron's groups, and sizes and ranks by name."""

    layout: ParallelConfig
    collection: ProcessGroupCollection
    tensor_size: int
    tensor_rank: int
    pipeline_size: int
    pipeline_rank: int
    context_size: int
    context_rank: int
    data_size: int
    data_rank: int

    @property
    def is_first_stage(self) -> bool:
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_rank == self.pipeline_size - 1

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes files and talks to the user."""
        return dist.get_rank() == 0

    @property
    def leads_replica(self) -> bool:
        """Whether this process speaks for its model replica: the first of its tensor and context ranks and stages."""
        return self.tensor_rank == 0 and self.pipeline_rank == 0 and self.context_rank == 0

    @property
    def sequence_multiple(self) -> int:
        """Tokens that the length of every packed sequence must be a multiple of: two pieces a context rank."""
        return 2 * self.context_size if self.context_size > 1 else 1

    @property
    def row_multiple(self) -> int:
        """Tokens that the length of a packed row must be a multiple of, for its split over context and tensor ranks."""
        by_tensor = self.context_size * self.tensor_size if self.layout.sequence else 1
        return math.lcm(self.sequence_multiple, by_tensor)

    @property
    def micro_batch_multiple(self) -> int:
        """The interleaved schedule takes micro-batches in groups of as many as there are stages."""
        return self.pipeline_size if self.layout.virtual_pipeline > 1 else 1

    def sum_over_data(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of `values` over data-parallel ranks, in fp64 so that its order does not show."""
        total = values.to(device(), torch.float64)
        dist.all_reduce(total, group=self.collection.dp)
        return total

    def gather_over_data(self, mine: list[T]) -> list[list[T]]:
        """Every data-parallel rank's list, in rank order, on every rank."""
        parts: list[Any] = [None] * self.data_size
        dist.all_gather_object(parts, mine, group=self.collection.dp)
        return parts

    def gather_over_world(self, mine: list[T]) -> list[list[T]]:
        """Every process's list, in rank order, on every process."""
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, mine)
        return parts

    def from_last_stage(self, value: T | None) -> T:
        """The last pipeline stage's `value`, on every stage."""
        if self.pipeline_size == 1:
            return value  # type: ignore[return-value]
        box = [value]
        last = dist.get_global_rank(self.collection.pp, self.pipeline_size - 1)
        dist.broadcast_object_list(box, src=last, group=self.collection.pp)
        return box[0]  # type: ignore[return-value]

    def from_main(self, value: T | None) -> T:
        """Global rank 0's `value`, on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]  # type: ignore[return-value]

    def barrier(self) -> None:
        dist.barrier()


@contextlib.contextmanager
def parallel_groups(config: ParallelConfig, *, seed: int) -> Iterator[ParallelGroups]:
    """Joins the job's processes (torchrun's environment, or one process alone) and splits them by `config`.

    Raises:
        ValueError: the number of processes is no multiple of tensor x pipeline x context.
    """
    check_world(config, int(os.environ.get("WORLD_SIZE", "1")))
    with joined_processes(config.timeout_seconds), split_processes(config, seed=seed) as groups:
        yield groups


def check_world(config: ParallelConfig, world: int) -> None:
    """Raises ValueError where `world` processes do not split into whole model replicas."""
    replica = config.tensor * config.pipeline * config.context
    if world % replica:
        raise ValueError(
            f"parallel: {world} process(es) do not split into replicas of tensor {config.tensor} x pipeline "
            f"{config.pipeline} x context {config.context} = {replica}; start a multiple of {replica} "
            "(torchrun --nproc-per-node)"
        )


@contextlib.contextmanager
def joined_processes(timeout_seconds: float) -> Iterator[None]:
    """The default process group; a collective that waits longer than the timeout raises (NCCL: ends the process)."""
    options: dict[str, Any] = {"timeout": timedelta(seconds=timeout_seconds)}
    if "MASTER_ADDR" not in os.environ:
        options |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group(collective_backend(), **options)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def split_processes(config: ParallelConfig, *, seed: int) -> Iterator[ParallelGroups]:
    """Splits the joined processes by `config`; leaving it, they may be split anew by another."""
    parallel_state.initialize_model_parallel(
        config.tensor,
        config.pipeline,
        virtual_pipeline_model_parallel_size=config.virtual_pipeline if config.virtual_pipeline > 1 else None,
        context_parallel_size=config.context,
        distributed_timeout_minutes=max(config.timeout_seconds / 60, 1 / 60),
    )
    try:
        tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
        yield ParallelGroups(
            layout=config,
            collection=ProcessGroupCollection.use_mpu_process_groups(),
            tensor_size=parallel_state.get_tensor_model_parallel_world_size(),
            tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
            pipeline_size=parallel_state.get_pipeline_model_parallel_world_size(),
            pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
            context_size=parallel_state.get_context_parallel_world_size(),
            context_rank=parallel_state.get_context_parallel_rank(),
            data_size=parallel_state.get_data_parallel_world_size(),
            data_rank=parallel_state.get_data_parallel_rank(),
        )
    finally:
        parallel_state.destroy_model_parallel()
