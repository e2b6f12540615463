"""Writer of a checkpoint directory in Megatron-Core's distributed format, from a forked process."""

from __future__ import annotations

import inspect
import os
import pickle
import queue
import signal
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.api import CheckpointException

from oreal_megatron.checkpoint.manifest import checksum, write_manifest
from oreal_megatron.distributed.groups import ParallelGroups
from oreal_megatron.files import sync
from oreal_megatron.stopping import SIGNALS

_PROBE_BYTES = 1 << 24
# Newer versions of Megatron-Core hand asynchronous saves to nvidia-resiliency-ext unless they are told otherwise; older
# ones have no such argument.
_ASYNC_STRATEGY: dict[str, Any] = (
    {"async_strategy": "mcore"} if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters else {}
)


class CheckpointWriter:
    """Writes checkpoint directories, one at a time."""

    def __init__(self, groups: ParallelGroups):
        self._groups = groups
        self._calls = AsyncCallsQueue(persistent=False)
        self._pending: tuple[Path, dict[str, Any], _ForkedResult | None] | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a directory was started and is not finished."""
        return self._pending is not None

    def start(self, directory: Path, sharded_state: dict[str, Any], **notes: Any) -> None:
        """Takes a snapshot of the state and begins to write it to an empty directory.

        The snapshot of state on a GPU is a copy on the host; on a CPU it is copy on write, by fork. Ranks that hold the
        same tensors share the writing of them. notes: further keys of the manifest.

        Raises:
            OSError: the disk refused.
        """
        assert not self.is_busy, "only one checkpoint is written at a time"
        # Replaces a queue behind a spawned manager, which would import __main__ again and take seconds.
        filesystem_async._results_queue = _ForkedResult()
        sums = None
        strategy = FullyParallelSaveStrategyWrapper(
            TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1), self._groups.collection.dp_cp
        )
        try:
            request = dist_checkpointing.save(
                sharded_state, str(directory), strategy, async_sharded_save=True, **_ASYNC_STRATEGY
            )
        except (CheckpointingException, CheckpointException, RuntimeError) as error:
            raise OSError(_reason(error, directory)) from error
        assert request is not None
        if request.async_fn is not None:  # None: this rank has nothing to write
            transforms, sums = request.async_fn.args[0], _ForkedResult()
            request = request._replace(async_fn=partial(_write, transforms, sums))
        self._calls.schedule_async_request(request)
        self._pending = directory, notes, sums

    def finish(self, *, wait: bool) -> Path | None:
        """Returns the directory that has become whole since the last call, or None; the same on all ranks.

        Raises:
            OSError: the disk refused.
        """
        if self._pending is None:
            return None
        directory, notes, sums = self._pending
        try:
            if not self._calls.maybe_finalize_async_calls(blocking=wait):
                return None
        except (CheckpointingException, CheckpointException, RuntimeError) as error:
            raise OSError(_reason(error, directory)) from error
        finally:
            if not self._calls.get_num_unfinalized_calls():
                self._pending = None
        parts = self._groups.gather_over_world([sums.get_nowait() if sums else {}])
        problem = None
        if self._groups.is_main:
            try:
                _seal(directory, {name: item for (part,) in parts for name, item in part.items()}, notes)
            except OSError as error:
                problem = str(error)
        if problem := self._groups.from_main(problem):
            raise OSError(problem)
        return directory


def _write(transforms: list[Any], sums: _ForkedResult, rank: int, buckets: list[Any], results: _ForkedResult) -> None:
    """Writes and syncs this rank's files in the forked process, and returns their names and checksums to the trainer.

    Replaces Megatron-Core's own loop, which forks again for every file and waits for ever where that process is killed.
    The checksums are taken here so that no trainer has to read its checkpoint again.
    """
    # torch's threads exist in the parent only: an operation that waits for them would never end.
    torch.set_num_threads(1)
    # The scheduler's signals go to all processes of a job; the trainer handles them.
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    written: queue.Queue[tuple[int, Any]] = queue.Queue()
    unfinished: queue.Queue[int] = queue.Queue()
    for index, bucket in enumerate(buckets):
        unfinished.put(index)
        FileSystemWriterAsync.write_preloaded_data(transforms, index, bucket, written, unfinished, use_fsync=True)
    answers = dict(written.get() for _ in buckets)
    failed = next((answer for answer in answers.values() if isinstance(answer, Exception)), None)
    if failed is None:
        sums.put({Path(bucket[0]).name: checksum(Path(bucket[0])) for bucket in buckets})
    results.put(failed or answers)


def _seal(directory: Path, sums: dict[str, dict[str, int]], notes: dict[str, Any]) -> None:
    """Syncs the files that Megatron-Core wrote without a sync, then writes the manifest."""
    for path in sorted(directory.iterdir()):
        if path.name not in sums:
            sync(path)
            sums[path.name] = checksum(path)
    sync(directory)
    write_manifest(directory, sums, **notes)


def _reason(error: BaseException, directory: Path) -> str:
    """Returns the disk's error, which torch's writer swallows, by asking for more room in the written files."""
    try:
        for path in directory.iterdir():
            with path.open("ab") as file:
                os.posix_fallocate(file.fileno(), file.tell(), _PROBE_BYTES)
    except OSError as refusal:
        return f"{refusal.strerror} ({_cause(error)})"
    return _cause(error)


def _cause(error: BaseException) -> str:
    """Returns the reason inside the exceptions of torch and Megatron-Core."""
    if isinstance(error, CheckpointException):
        reasons = {f"rank {rank}: {_cause(failure[0])}" for rank, failure in error.failures.items()}
        return "; ".join(sorted(reasons)) or "another rank could not write its part"
    return str(error).split("\n")[0]


class _ForkedResult:
    """Object passed from a forked process to its parent through anonymous memory, which needs no disk."""

    def __init__(self) -> None:
        self._descriptor = os.memfd_create("checkpoint")

    def __del__(self) -> None:
        os.close(self._descriptor)

    def put(self, item: Any) -> None:
        """Passes an object to the parent."""
        with open(self._descriptor, "wb", closefd=False) as file:
            pickle.dump(item, file)

    def get_nowait(self) -> Any:
        """Returns the object, or a RuntimeError where the process ended before `put`, as Megatron-Core expects it."""
        with open(self._descriptor, "rb", closefd=False) as file:
            file.seek(0)
            content = file.read()
        return pickle.loads(content) if content else RuntimeError("the process that writes it was killed")
