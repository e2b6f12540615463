"""Generation in the background of training: a replica's requests at the servers, and a thread that grades what returns.

The event loop of the engine keeps what servers return; grading needs no server, so generation may end and begin again
while the thread still grades. What a batch has is changed under one lock.
"""

from __future__ import annotations

import contextlib
import logging
import pickle
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

from oreal_megatron.config import SamplingConfig
from oreal_megatron.distributed.groups import ParallelGroups
from oreal_megatron.rollout.sample_call import SampleCall
from oreal_megatron.rollout.sampler import Sampler
from oreal_megatron.rollout.sglang_engine import SGLangEngine
from oreal_megatron.rollout.units import Generation, Outcome
from oreal_megatron.types import Completion, GenerationRequest, GradedRollout, Prompt

logger = logging.getLogger(__name__)

_CLOSE_SECONDS = 5.0
"""Seconds that `close` waits for the grading of a unit, which a judge may hold up."""


@dataclass(kw_only=True)
class Batch:
    """The prompts of a step and what there is of their responses."""

    step: int
    prompts: Sequence[Prompt]
    call: SampleCall
    mine: Sequence[int]
    """Units of this replica that the journal did not have."""
    finished: dict[int, list[GradedRollout]]
    """Graded units of this replica, on its leading process; on the main process the journal's units too."""
    partial: dict[int, Completion]
    """Responses, finished or not, of units that are not served; by the index of their request."""
    ungraded: dict[int, Sequence[Completion]] = field(default_factory=dict)
    """Responses of units that wait for their grades."""
    served: set[int] = field(default_factory=set)
    """Units of this replica of which all responses are there, graded or not."""

    @property
    def unserved(self) -> list[int]:
        """Units of this replica that are to be generated."""
        return [index for index in self.mine if index not in self.served]

    @property
    def is_served(self) -> bool:
        """Whether all responses of this replica are there."""
        return len(self.served) == len(self.mine)

    @property
    def num_graded(self) -> int:
        """Number of units of this replica that the journal did not have and that are graded now."""
        return len(self.served) - len(self.ungraded)

    @property
    def is_graded(self) -> bool:
        """Whether all units of this replica are graded."""
        return self.is_served and not self.ungraded

    def unit(self, index: int) -> list[GenerationRequest]:
        """Returns the requests of a unit, each with the beginning of its response."""
        return [replace(self.call.requests[i], partial=self.partial.get(i)) for i in self.call.units[index]]

    def keep(self, index: int, completions: Sequence[Completion]) -> None:
        """Keeps what servers returned for a unit: to be graded, or, if it was broken off, to go on from."""
        answered = dict(zip(self.call.units[index], completions, strict=True))
        if any(completion.finish_reason is None for completion in completions):
            self.partial |= {i: completion for i, completion in answered.items() if completion.token_ids}
            return
        for i in answered:
            self.partial.pop(i, None)
        self.ungraded[index] = completions
        self.served.add(index)

    def ungraded_responses(self) -> dict[tuple[str, int], Completion]:
        """Returns all responses of this replica without grades, finished or not, by prompt id and sample index."""
        responses = dict(self.partial)
        for index, completions in self.ungraded.items():
            responses |= dict(zip(self.call.units[index], completions, strict=True))
        return {(self.call.asked[i][0].id, self.call.asked[i][1]): response for i, response in responses.items()}


@dataclass(frozen=True, kw_only=True)
class ProcessState:
    """State of a process that waits for responses in the background, for the other processes."""

    is_done: bool = True
    has_no_weights: bool = False
    """Whether a server waits for weights that no server has."""
    is_stopped: bool = False
    """Whether this process was asked to stop."""
    error: Exception | None = None
    num_ready: int = 0
    """Finished groups of later steps."""
    busy_seconds: float = 0.0
    """Seconds in which servers had a request of this process."""


def states_of_all(groups: ParallelGroups, state: ProcessState) -> list[ProcessState]:
    """Returns the states of all processes. Every rank calls it.

    Raises:
        NoServerError, ValueError, OSError, RuntimeError: on every rank, the first error in the background.
    """
    states = [part[0] for part in groups.gather_over_world([state])]
    error = next((state.error for state in states if state.error is not None), None)
    if error is not None:
        raise error
    return states


class BackgroundGeneration:
    """Generation of batches by the leading process of a replica, while its main thread does something else.

    Attributes are read by the main thread, and changed under the lock.
    """

    def __init__(self, engine: SGLangEngine, sampler: Sampler, sampling: SamplingConfig):
        """Starts the thread that grades; generates nothing yet."""
        self.error: Exception | None = None
        """The first error, which every process raises: see `portable`."""
        self.has_no_weights = False
        """Whether a server waits for weights that no server has."""
        self._engine, self._sampler, self._sampling = engine, sampler, sampling
        self._changed = threading.Condition()
        self._must_end = threading.Event()
        self._generation: Generation | None = None
        self._jobs: list[tuple[Batch, int]] = []
        """Batch and unit of every position in the generation."""
        self._num_at_servers = 0
        self._busy_seconds, self._busy_since = 0.0, 0.0
        self._to_grade: queue.SimpleQueue[tuple[Batch, int] | None] = queue.SimpleQueue()
        self._is_closed = False
        self._thread = threading.Thread(target=self._grade, name="rollouts-ahead", daemon=True)
        self._thread.start()

    @property
    def is_running(self) -> bool:
        """Whether servers may have requests of this process."""
        return self._generation is not None

    def add(self, batches: Sequence[Batch]) -> None:
        """Has servers generate what is unserved of batches, in their order, behind what they generate already."""
        with self._changed:
            jobs = [(batch, index) for batch in batches for index in batch.unserved]
            if jobs and not self._num_at_servers:
                self._busy_since = time.perf_counter()
            self._num_at_servers += len(jobs)
            if self._generation is None:
                self._must_end, self._jobs = threading.Event(), []
                self._generation = self._engine.start(self._sampling, self._must_end.is_set, self._returned)
                self._generation.future.add_done_callback(self._ended)
            self._jobs += jobs
            self._generation.add([batch.unit(index) for batch, index in jobs])

    def end(self) -> None:
        """Has servers abort what is unserved, which is kept; `is_running` is false afterwards, within seconds."""
        self._must_end.set()

    def cancel(self) -> None:
        """Ends generation at once; what servers have of unserved units is lost."""
        self._must_end.set()
        if (generation := self._generation) is not None:
            generation.future.cancel()

    def cancel_after(self, seconds: float) -> None:
        """Has `cancel` called where generation has not ended in `seconds`."""
        late = threading.Timer(seconds, self.cancel)
        late.daemon = True
        late.start()

    def stop_grading(self) -> None:
        """Has the thread end after the unit that it grades; the units that wait stay ungraded."""
        self._is_closed = True
        self._to_grade.put(None)

    def close(self) -> None:
        """Ends generation and grading. A unit that is still graded after 5 seconds is not waited for."""
        self.cancel()
        self.stop_grading()
        self._thread.join(_CLOSE_SECONDS)

    def wait(self, is_done: Callable[[], bool], seconds: float) -> bool:
        """Returns `is_done` once it is true, there is an error, or `seconds` are over."""
        with self._changed:
            self._changed.wait_for(lambda: is_done() or self.error is not None, seconds)
            return is_done()

    def busy_seconds(self) -> float:
        """Returns the seconds since the last call of `reset_busy_seconds` in which servers had a request."""
        with self._changed:
            return self._busy_seconds + (time.perf_counter() - self._busy_since if self._num_at_servers else 0.0)

    def reset_busy_seconds(self) -> None:
        """Begins to count the seconds in which servers have a request."""
        with self._changed:
            self._busy_seconds, self._busy_since = 0.0, time.perf_counter()

    @contextlib.contextmanager
    def publication(self) -> Iterator[None]:
        """Publishes weights within: time in which servers generate nothing.

        A server that has no weights after it reports that again.
        """
        start = time.perf_counter()
        with self._changed:
            self.has_no_weights = False
        yield
        with self._changed:
            if self._num_at_servers:
                self._busy_seconds -= time.perf_counter() - max(start, self._busy_since)

    def ungraded_responses(self, batch: Batch) -> dict[tuple[str, int], Completion]:
        """See Batch."""
        with self._changed:
            return batch.ungraded_responses()

    def _count_down(self, number: int) -> None:
        self._num_at_servers -= number
        if number and not self._num_at_servers:
            self._busy_seconds += time.perf_counter() - self._busy_since

    def _returned(self, outcome: Outcome) -> None:
        """Takes an outcome of the generation; on the event loop."""
        with self._changed:
            if outcome.value is not None and self._generation is not None:
                position, completions = outcome.value
                batch, index = self._jobs[position]
                batch.keep(index, completions)
                self._count_down(1)
                if index in batch.served:
                    self._to_grade.put((batch, index))
            elif outcome.no_current_weights:
                self.has_no_weights = True
            elif outcome.error is not None:
                self._fail(outcome.error)
            self._changed.notify_all()

    def _ended(self, future: Future[None]) -> None:
        with self._changed:
            self._generation, self.has_no_weights = None, False
            self._count_down(self._num_at_servers)
            if not self._must_end.is_set() and self.error is None:
                self._fail(RuntimeError("the generation of rollouts was cancelled"))
            self._changed.notify_all()

    def _fail(self, error: BaseException) -> None:
        if self.error is None:
            self.error = portable(error)
        self._must_end.set()

    def _grade(self) -> None:
        """Grades and journals units, until `stop_grading` or an error."""
        while (job := self._to_grade.get()) is not None and not self._is_closed:
            batch, index = job
            try:
                unit = self._sampler.graded_unit(batch.call, index, batch.ungraded[index])
                self._sampler.journal.append(batch.call.batch_name, batch.call.keys[index], unit)
            except BaseException as error:
                with self._changed:
                    self._fail(error)
                    self._changed.notify_all()
                return
            with self._changed:
                batch.finished[index] = unit
                del batch.ungraded[index]
                self._changed.notify_all()


def portable(error: BaseException) -> Exception:
    """Returns an error that can be sent to other processes: `error`, or else its text, with a traceback in the log."""
    if isinstance(error, OSError | ValueError):
        with contextlib.suppress(Exception):
            pickle.loads(pickle.dumps(error))
            return error
    logger.error("an error in the background of training", exc_info=error)
    return RuntimeError(f"{type(error).__name__}: {error}")
