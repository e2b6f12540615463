"""Rollouts ahead of training: servers generate for later steps while the trainer works on an earlier step.

The prompts of a step are a batch, drawn in the order of the steps and trained in that order, whichever responses come
first; so a short response has no advantage over a long one. At step s the servers have batches s to s + max_staleness.
Generation is ended before every publication and begins again with the next step, which gives two properties:

- A batch is drawn at most max_staleness steps before it trains, and a step makes one update at most, so no token is
  older than the bound.
- Every collective is called by the main thread, between two phases of a step. The leading process of a replica has an
  event loop that talks to the servers, and a thread that grades and journals finished units; neither of them waits for
  another process.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from oreal_megatron.checkpoint.store import step_name
from oreal_megatron.config import SamplingConfig
from oreal_megatron.config.rollout import RolloutConfig
from oreal_megatron.distributed.groups import ParallelGroups
from oreal_megatron.rollout.sample_call import SampleCall, staleness
from oreal_megatron.rollout.sampler import Sampler, SampleResult, rollout_seeds
from oreal_megatron.rollout.sglang_engine import Outcome, SGLangEngine
from oreal_megatron.stopping import Stopped, StopRequest
from oreal_megatron.types import Completion, GenerationRequest, GradedRollout, Prompt


@dataclass(kw_only=True)
class _Batch:
    """The prompts of a step and what there is of their responses."""

    step: int
    prompts: Sequence[Prompt]
    call: SampleCall
    mine: Sequence[int]
    """Units of this replica that the journal did not have."""
    finished: dict[int, list[GradedRollout]]
    """Graded units of this replica, on its leading process; on the main process the journal's units too."""
    partial: dict[int, Completion] = field(default_factory=dict)
    """Responses, finished or not, of units that are not; by the index of their request."""

    @property
    def unfinished(self) -> list[int]:
        """Units of this replica that are to be generated."""
        return [index for index in self.mine if index not in self.finished]

    def unit(self, index: int) -> list[GenerationRequest]:
        """Returns the requests of a unit, each with the beginning of its response."""
        return [replace(self.call.requests[i], partial=self.partial.get(i)) for i in self.call.units[index]]


@dataclass(frozen=True, kw_only=True)
class _State:
    """State of a process that waits, for the others."""

    is_done: bool = True
    has_no_weights: bool = False
    is_stopped: bool = False
    error: Exception | None = None
    num_ready: int = 0
    """Finished groups of later steps."""
    busy_seconds: float = 0.0


class RolloutsAhead:
    """Batches of rollouts for the present step and later steps. Every rank calls every method."""

    def __init__(
        self,
        sampler: Sampler,
        engine: SGLangEngine,
        groups: ParallelGroups,
        stop: StopRequest,
        config: RolloutConfig,
        *,
        run_seed: int,
        num_steps: int,
    ):
        """Generates nothing yet. num_steps: steps of the run, after which no batch is drawn."""
        self._sampler = sampler
        self._engine = engine
        self._groups = groups
        self._stop = stop
        self._config = config
        self._run_seed = run_seed
        self._num_steps = num_steps
        self._batches: deque[_Batch] = deque()
        self._is_generating = False
        self._generation: _Generation | None = None  # on the leading process of a replica
        self._busy_seconds = 0.0

    def waiting(self, step: int) -> list[Prompt]:
        """Returns the prompts that are drawn for `step` and later steps, in their order."""
        return [prompt for batch in self._batches if batch.step >= step for prompt in batch.prompts]

    def take(self, step: int, draw: Callable[[], list[Prompt]]) -> SampleResult:
        """Returns the graded groups of a step, and has the servers generate for later steps from then on.

        draw: returns the next step's prompts. The prompts of the step stay among those of `waiting` until the next
        step. The policy has the weights of the last publication.

        Raises:
            Stopped: a stop was asked for; finished units are in the journal.
            NoServerError, ValueError: see RolloutEngine. OSError: the journal cannot be written.
        """
        assert not self._is_generating
        self._busy_seconds = 0.0
        while self._batches and self._batches[0].step < step:
            self._batches.popleft()
        discarded = self._admit(step, draw)
        batch = self._batches[0]
        assert batch.step == step
        while True:
            if not self._is_generating:
                self._begin()
            states = self._wait(lambda: not batch.unfinished)
            if any(state.is_stopped for state in states):
                self._end(is_cancelled=True)
                raise Stopped(
                    f"stopped while {batch.call.batch_name} was generated: finished rollouts are in the journal, the "
                    "same command goes on with the others"
                )
            if all(state.is_done for state in states):
                break
            self._end()
            self._engine.resend()
        groups = self._sampler.complete_groups(batch.call, batch.finished)
        metrics = {
            **staleness(groups, self._engine.weight_version),
            "rollout/discarded_tokens": float(discarded),
            "rollout/groups_ahead": float(sum(state.num_ready for state in states)),
        }
        return SampleResult(groups=groups, unfinished=[], metrics=metrics)

    def settle(self) -> float:
        """Ends generation, so that weights can be published; of one_ahead, once the next step's rollouts are complete.

        Returns the seconds since `take` in which this job had a request at a server. A request to stop, and servers of
        which none has the current weights, end generation at once; what is unfinished goes on with the next `take`.

        Raises:
            NoServerError, ValueError, OSError: see `take`.
        """
        if self._is_generating:
            is_stopped = self._groups.any_rank(self._stop.is_made)
            if self._config.schedule == "one_ahead" and not is_stopped:
                states = self._wait(lambda: not any(batch.unfinished for batch in self._batches))
                is_stopped = any(state.is_stopped for state in states)
            self._end(is_cancelled=is_stopped)
        return self._busy_seconds

    def close(self) -> None:
        """Ends generation at once, also after an error; not a collective."""
        if self._generation is not None:
            self._generation.end(is_cancelled=True)
            self._generation.join()

    def _admit(self, step: int, draw: Callable[[], list[Prompt]]) -> int:
        """Draws the batches that the bound allows at `step`; returns the journal's tokens that are too old for it."""
        discarded = 0
        for later in range(step + len(self._batches), min(step + self._config.max_staleness + 1, self._num_steps)):
            prompts = draw()
            call = self._sampler.call(
                prompts,
                batch_name=step_name(later),
                num_samples=self._config.samples_per_prompt,
                sampling=self._config.sampling,
                seed_of=rollout_seeds(self._run_seed, "train", later),
                weight_version=None,
            )
            # Every step until then may make an update.
            oldest = self._engine.weight_version + (later - step) - self._config.max_staleness
            journalled = self._sampler.journalled(call)
            finished = {index: unit for index, unit in journalled.items() if _oldest(unit) >= oldest}
            tokens = sum(
                graded.rollout.num_response_tokens
                for index in journalled.keys() - finished.keys()
                for graded in journalled[index]
            )
            known, tokens = self._groups.from_main((set(finished), tokens))
            todo = [index for index in range(len(call.units)) if index not in known]
            mine = todo[self._groups.data_rank :: self._groups.data_size]
            self._batches.append(_Batch(step=later, prompts=prompts, call=call, mine=mine, finished=finished))
            discarded += tokens
        return discarded

    def _begin(self) -> None:
        """Has the servers generate what is unfinished, the oldest batch first."""
        self._is_generating = True
        if self._groups.leads_replica:
            jobs = [(batch, index) for batch in self._batches for index in batch.unfinished]
            self._generation = _Generation(self._engine, self._sampler, jobs, self._config.sampling)

    def _end(self, *, is_cancelled: bool = False) -> None:
        """Ends generation. is_cancelled: unfinished responses are not waited for, and their tokens are dropped."""
        if self._generation is not None:
            self._generation.end(is_cancelled=is_cancelled)
        generation = self._generation
        states = self._wait(lambda: generation is None or generation.has_ended, until_end=True)
        self._busy_seconds += max(state.busy_seconds for state in states)
        self._generation, self._is_generating = None, False

    def _wait(self, is_done: Callable[[], bool], *, until_end: bool = False) -> list[_State]:
        """Returns the states of all processes once `is_done` is true on every leading process, or waiting is in vain.

        That is where a stop is asked for, or servers wait for weights that no server has; until_end: wait in these
        cases too. Waiting processes repeat short collectives: none of them exceeds its timeout however long generation
        takes, and a signal is noticed, whose handler cannot run inside a collective.

        Raises:
            NoServerError, ValueError, OSError: on every rank, the error of a generation.
            LostPeer: another rank of the job has failed.
        """
        while True:
            state = _State(is_stopped=self._stop.is_made)
            if self._generation is not None:
                self._generation.wait(is_done, self._engine.heartbeat_seconds, until_end=until_end)
                state = _State(
                    is_done=is_done(),
                    has_no_weights=self._generation.has_no_weights,
                    is_stopped=self._stop.is_made,
                    error=self._generation.error,
                    num_ready=sum(len(batch.mine) - len(batch.unfinished) for batch in list(self._batches)[1:]),
                    busy_seconds=self._generation.busy_seconds(),
                )
            states = [part[0] for part in self._groups.gather_over_world([state])]
            error = next((state.error for state in states if state.error is not None), None)
            if error is not None:
                raise error
            in_vain = any(state.is_stopped or state.has_no_weights for state in states)
            if all(state.is_done for state in states) or (in_vain and not until_end):
                return states
            self._groups.check_others()


class _Generation:
    """Generation of units while the trainer works: a thread takes them from the engine, grades and journals them."""

    def __init__(
        self,
        engine: SGLangEngine,
        sampler: Sampler,
        jobs: Sequence[tuple[_Batch, int]],
        sampling: SamplingConfig,
    ):
        """Begins at once. jobs: units as batch and index; they are not touched by another thread until the end."""
        self.error: Exception | None = None
        self.has_no_weights = False
        """Whether a server waits for weights that no server has."""
        self.has_ended = False
        self._sampler = sampler
        self._jobs = jobs
        self._changed = threading.Condition()
        self._is_enough = threading.Event()
        self._finished: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        self._start = time.perf_counter()
        self._seconds: float | None = None
        units = [batch.unit(index) for batch, index in jobs]
        self._future = engine.start(units, sampling, self._is_enough.is_set, self._finished)
        self._future.add_done_callback(self._served)
        self._thread = threading.Thread(target=self._run, name="rollouts-ahead", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Waits for the thread, which ends after a cancellation or its last unit."""
        self._thread.join()

    def wait(self, is_done: Callable[[], bool], seconds: float, *, until_end: bool) -> None:
        """Returns once `is_done` is true, generation has ended or (not `until_end`) is in vain, or after `seconds`."""
        with self._changed:
            self._changed.wait_for(
                lambda: is_done() or self.has_ended or (self.has_no_weights and not until_end), seconds
            )

    def end(self, *, is_cancelled: bool) -> None:
        """Has servers abort what is unfinished, which is kept. is_cancelled: it is neither waited for nor kept."""
        self._is_enough.set()
        if is_cancelled:
            self._future.cancel()

    def busy_seconds(self) -> float:
        """Returns the seconds in which there was a request for the servers."""
        return time.perf_counter() - self._start if self._seconds is None else self._seconds

    def _served(self, future: object) -> None:
        self._seconds = time.perf_counter() - self._start
        self._finished.put(Outcome())  # a cancelled generation has put none

    def _run(self) -> None:
        try:
            while True:
                outcome = self._finished.get()
                if outcome.error is not None:
                    raise outcome.error
                if outcome.no_current_weights:
                    self.has_no_weights = True
                elif outcome.value is None:
                    break
                else:
                    position, completions = outcome.value
                    batch, index = self._jobs[position]
                    self._take(batch, index, completions)
                with self._changed:
                    self._changed.notify_all()
        except Exception as error:
            self.error = error
            self._future.cancel()
        finally:
            with self._changed:
                self.has_ended = True
                self._changed.notify_all()

    def _take(self, batch: _Batch, index: int, completions: Sequence[Completion]) -> None:
        """Keeps the responses of a unit: graded and journalled, or, if it was broken off, to go on from."""
        if any(completion.finish_reason is None for completion in completions):
            answered = zip(batch.call.units[index], completions, strict=True)
            batch.partial |= {i: completion for i, completion in answered if completion.token_ids}
            return
        unit = self._sampler.graded_unit(batch.call, index, completions)
        self._sampler.journal.append(batch.call.batch_name, batch.call.keys[index], unit)
        batch.finished[index] = unit


def _oldest(unit: Sequence[GradedRollout]) -> float:
    """Returns the oldest weight version of a unit's tokens; infinity without tokens."""
    return min((span.version for graded in unit for span in graded.rollout.weight_spans), default=float("inf"))
