"""Process groups of a model layout, created once and passed as an argument."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.utils._pytree import tree_map_only

from oreal_megatron.config import ConfigError, ParallelConfig, Violation
from oreal_megatron.distributed.addresses import address_on_route, choose_gloo_interface
from oreal_megatron.distributed.cpu_backend import collective_backend, device
from oreal_megatron.distributed.first_failure import check_others, first_line, joining_together, lost_peer
from oreal_megatron.stopping import LostPeer, Stopped

T = TypeVar("T")


@dataclass(frozen=True)
class ParallelGroups:
    """The layout, Megatron-Core's process groups, and this process's rank in each of them."""

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
    host: Mapping[str, dist.ProcessGroup] = field(default_factory=dict)
    """Gloo groups of `world`, and of this process's `replica`, `data`-parallel ranks and `pipeline`.

    Python objects and waits go through them: a process that waits inside NCCL occupies its GPU, on which a colocated
    server may generate.
    """
    store: dist.Store | None = None
    """Store of the job's rendezvous; None for groups without processes."""

    @property
    def is_first_stage(self) -> bool:
        """Whether this process has the first pipeline stage."""
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this process has the last pipeline stage."""
        return self.pipeline_rank == self.pipeline_size - 1

    @property
    def rank(self) -> int:
        """Global rank of this process."""
        return dist.get_rank()

    @property
    def world_size(self) -> int:
        """Number of processes of the job."""
        return dist.get_world_size()

    @property
    def is_main(self) -> bool:
        """Whether this process has global rank 0, which writes files and prints."""
        return dist.get_rank() == 0

    @property
    def leads_replica(self) -> bool:
        """Whether this process is the first of its model replica: tensor, context and pipeline rank 0."""
        return self.tensor_rank == 0 and self.pipeline_rank == 0 and self.context_rank == 0

    @property
    def sequence_multiple(self) -> int:
        """Number of tokens that every packed sequence's length must be a multiple of: two pieces a context rank."""
        return 2 * self.context_size if self.context_size > 1 else 1

    def row_multiple(self, rank_tokens: int = 1) -> int:
        """Returns the number of tokens that the length of a packed row must be a multiple of.

        Context ranks split the row, and tensor ranks under sequence parallelism.

        Args:
            rank_tokens: number of tokens that a context rank's part must be a multiple of, for FP8 matrix products.
        """
        if rank_tokens > 1:
            # The same with and without sequence parallelism, so that the scale of a whole tensor does not depend on it.
            return math.lcm(rank_tokens * self.context_size, 2 * self.context_size * self.tensor_size)
        by_tensor = self.context_size * self.tensor_size if self.layout.sequence else 1
        return math.lcm(self.sequence_multiple, by_tensor)

    @property
    def micro_batch_multiple(self) -> int:
        """Number that the count of micro-batches must be a multiple of: the stages, under the interleaved schedule."""
        return self.pipeline_size if self.layout.virtual_pipeline > 1 else 1

    def sum_over_data(self, values: torch.Tensor) -> torch.Tensor:
        """Returns the sum of `values` over data-parallel ranks, in fp64 so that the order of ranks does not show."""
        total = values.to(device(), torch.float64)
        dist.all_reduce(total, group=self.collection.dp)
        return total

    def max_over_world(self, values: torch.Tensor) -> torch.Tensor:
        """Returns the elementwise maximum of `values` over all processes."""
        largest = values.to(device())
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return largest

    def gather_over_data(self, mine: list[T]) -> list[list[T]]:
        """Returns the lists of all data-parallel ranks, in rank order, on every rank."""
        parts: list[Any] = [None] * self.data_size
        dist.all_gather_object(parts, mine, group=self.host["data"])
        return parts

    def gather_over_world(self, mine: list[T]) -> list[list[T]]:
        """Returns the lists of all processes, in rank order, on every process."""
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, mine, group=self.host["world"])
        return parts

    def gather_to_main(self, mine: T) -> list[T]:
        """Returns the values of the first processes of all model replicas, in their order, on the main process.

        The other processes get an empty list. All processes call it.
        """
        if self.is_main:
            return [mine, *(self._received(replica) for replica in range(1, self.data_size))]
        if self.leads_replica:
            dist.send_object_list([mine], group_dst=0, group=self.host["data"])
        return []

    def scatter_from_main(self, parts: Sequence[T] | None) -> T:
        """Returns part r of the main process's `parts` on every process of model replica r."""
        mine = None
        if self.is_main:
            assert parts is not None
            for replica in range(1, self.data_size):
                dist.send_object_list([parts[replica]], group_dst=replica, group=self.host["data"])
            mine = parts[0]
        elif self.leads_replica:
            mine = self._received(0)
        return self.from_replica_leader(mine)

    def _received(self, replica: int) -> Any:
        box = [None]
        dist.recv_object_list(box, group_src=replica, group=self.host["data"])
        return box[0]

    def from_last_stage(self, value: T | None) -> T:
        """Returns the last pipeline stage's `value` on every stage, tensors in it on this process's device."""
        if self.pipeline_size == 1:
            return value  # type: ignore[return-value]
        # A pickled CUDA tensor would come back on the sender's device.
        box = [tree_map_only(torch.Tensor, torch.Tensor.cpu, value)]
        dist.broadcast_object_list(box, group=self.host["pipeline"], group_src=self.pipeline_size - 1)
        return tree_map_only(torch.Tensor, lambda tensor: tensor.to(device()), box[0])  # type: ignore[no-any-return]

    def from_main(self, value: T | None) -> T:
        """Returns global rank 0's `value` on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.host["world"])
        return box[0]  # type: ignore[return-value]

    def from_replica_leader(self, value: T | None) -> T:
        """Returns the `value` of the first process of this model replica on every process of the replica."""
        if self.world_size == self.data_size:
            return value  # type: ignore[return-value]
        box = [value]
        dist.broadcast_object_list(box, group=self.host["replica"], group_src=0)
        return box[0]  # type: ignore[return-value]

    def any_rank(self, mine: bool) -> bool:
        """Returns on every process of the job whether `mine` is true on any of them."""
        return self._any(mine, "world")

    def any_of_replica(self, mine: bool) -> bool:
        """Returns on every process of this model replica whether `mine` is true on any of them."""
        return self._any(mine, "replica")

    def _any(self, mine: bool, scope: str) -> bool:
        flag = torch.tensor([int(mine)], device="cpu")
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.host[scope])
        return bool(flag.item())

    def seed_generators(self, seed: int) -> None:
        """Seeds the generators of torch and of Megatron-Core, differently on every tensor rank and stage.

        Called at the start of every step with the seed of the step, so that a resumed run needs no saved generator
        state in any layout.
        """
        tensor_parallel.model_parallel_cuda_manual_seed(seed % 2**31 + 100 * self.pipeline_rank, force_reset_rng=True)

    def barrier(self) -> None:
        """Waits for all processes of the job."""
        dist.barrier(group=self.host["world"])

    def count(self, name: str, more: int = 0) -> int:
        """Adds `more` to a counter that all processes of the job share, and returns it, without waiting for them."""
        # The counter is in the store of the job's rendezvous, to which torch has no public accessor.
        return int(dist.distributed_c10d._get_default_store().add(f"count/{name}", more))

    def check_others(self) -> None:
        """Raises LostPeer if another process of the job has failed. Call it in waits that are no collectives."""
        if self.store is not None:
            check_others(self.store, self.rank)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Waits at the end of the block for all processes, and raises on all of them if one of them raised.

        Raises:
            OSError, ValueError: the block raised it on this process.
            OSError: the block raised on another process; the message is that of the first such process.
        """
        failed: OSError | ValueError | None = None
        try:
            yield
        except (OSError, ValueError) as error:
            failed = error
        others = [text for part in self.gather_over_world([str(failed)] if failed else []) for text in part]
        if failed:
            raise failed
        if others:
            raise OSError(others[0])


@contextlib.contextmanager
def parallel_groups(config: ParallelConfig, *, seed: int) -> Iterator[ParallelGroups]:
    """Joins the processes of the job, by torchrun's environment or as a single process, and splits them by `config`.

    Raises:
        ConfigError: the number of processes is no multiple of tensor x pipeline x context.
        ConnectionError: the processes cannot connect.
        LostPeer: the block failed because another rank failed first.
    """
    check_world(config, int(os.environ.get("WORLD_SIZE", "1")))
    timeout = timedelta(seconds=config.timeout_seconds)
    alone = "MASTER_ADDR" not in os.environ
    store, rank, world = (dist.HashStore(), 0, 1) if alone else _rendezvous(timeout)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    failed = False
    try:
        with joining_together(store, rank, timeout_seconds=config.timeout_seconds):
            choose_gloo_interface(_peers(store, rank, world))
            dist.init_process_group(collective_backend(), store=store, rank=rank, world_size=world, timeout=timeout)
            # Megatron-Core creates groups of its own, which do not take over the default group's timeout.
            minutes = config.timeout_seconds / 60
            groups = split_processes(config, seed=seed, host_backend="gloo", distributed_timeout_minutes=minutes)
        yield replace(groups, store=store)
    except Stopped:
        raise
    except (KeyboardInterrupt, LostPeer):
        failed = True
        raise
    except Exception as error:
        failed = True
        # This comes before the groups are destroyed, which the other ranks notice.
        if (lost := lost_peer(error, store, rank)) is not None:
            raise lost from error
        raise
    finally:
        parallel_state.destroy_model_parallel()
        # After a failure NCCL would wait for collectives that never end.
        if dist.is_initialized() and not (failed and torch.cuda.is_available()):
            dist.destroy_process_group()


def _rendezvous(timeout: timedelta) -> tuple[dist.Store, int, int]:
    """Returns the store of the job, this process's rank, and the number of processes.

    Raises:
        ConnectionError: the processes did not meet within the timeout, or the first one's port is taken.
    """
    try:
        return next(dist.rendezvous("env://", timeout=timeout))
    except dist.DistError as error:
        if "EADDRINUSE" in str(error):
            raise ConnectionError(
                f"MASTER_PORT = {os.environ['MASTER_PORT']}: another process listens at it on {socket.gethostname()}; "
                "set it to a free port of that host"
            ) from error
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} (MASTER_ADDR, MASTER_PORT)"
        raise ConnectionError(
            f"rank {os.environ['RANK']}: the {os.environ['WORLD_SIZE']} processes of the job did not meet at {place} "
            f"within parallel.timeout_seconds = {timeout.total_seconds():g}; start all of them, and set MASTER_ADDR to "
            f"an address of the first host that every host reaches ({first_line(error)})"
        ) from error


def _peers(store: dist.Store, rank: int, world: int) -> Iterable[str]:
    """Returns the hosts to which this rank may find its route to the others: the first rank's, then all other hosts.

    The first host cannot find its route by its own address, and gets those of the others. So every rank gives its
    address to the store, also one that asks for none; it waits for those of the others as they are taken.
    """
    if (main := os.environ.get("MASTER_ADDR")) is None:
        return ()
    store.set(f"address/{rank}", address_on_route(main) or "")
    return itertools.chain([main], (store.get(f"address/{number}").decode() for number in range(world)))


def split_processes(config: ParallelConfig, *, seed: int, host_backend: str, **options: Any) -> ParallelGroups:
    """Splits the processes of the default process group, until `parallel_state.destroy_model_parallel`.

    Args:
        config: the layout.
        seed: seed of Megatron-Core's generators.
        host_backend: backend of the groups of host memory.
        options: further arguments of Megatron-Core's `initialize_model_parallel`.
    """
    parallel_state.initialize_model_parallel(
        config.tensor,
        config.pipeline,
        virtual_pipeline_model_parallel_size=config.virtual_pipeline if config.virtual_pipeline > 1 else None,
        context_parallel_size=config.context,
        **options,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    return ParallelGroups(
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
        host=_host_groups(config, host_backend),
    )


def _host_groups(config: ParallelConfig, backend: str) -> dict[str, dist.ProcessGroup]:
    """Returns this process's groups for objects and waits. Every process calls it."""
    timeout = timedelta(seconds=config.timeout_seconds)
    # Megatron-Core's order: tensor ranks change fastest, then context, data and pipeline ranks.
    ranks = np.arange(dist.get_world_size()).reshape(config.pipeline, -1, config.context, config.tensor)
    lists = {
        "world": ranks.reshape(1, -1),
        "replica": np.moveaxis(ranks, 1, 0).reshape(ranks.shape[1], -1),
        "data": np.moveaxis(ranks, 1, -1).reshape(-1, ranks.shape[1]),
        "pipeline": np.moveaxis(ranks, 0, -1).reshape(-1, config.pipeline),
    }
    found = {}
    for scope, members in lists.items():
        for some in members.tolist():
            group = dist.new_group(some, timeout=timeout, backend=backend)
            if dist.get_rank() in some:
                found[scope] = group
    return found


def check_world(config: ParallelConfig, world: int) -> None:
    """Raises ConfigError if `world` processes do not split into whole model replicas."""
    replica = config.tensor * config.pipeline * config.context
    if world % replica:
        layout = f"tensor {config.tensor} x pipeline {config.pipeline} x context {config.context} = {replica}"
        remedy = (
            f"{world} process(es) do not split into replicas of {replica}; start a multiple of {replica} processes "
            "(torchrun --nproc-per-node)"
        )
        raise ConfigError([Violation("parallel", layout, remedy)])
