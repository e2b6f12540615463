"""Sampling of calls with one version of the weights, in the background of training.

The servers are of an engine of their own, which publishes nothing until the calls are complete. As in `ahead.py`, every
collective is called by the main thread, and what runs in the background waits for no other process.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence

from oreal_megatron.config import SamplingConfig
from oreal_megatron.distributed.groups import ParallelGroups
from oreal_megatron.rollout.background import BackgroundGeneration, Batch, ProcessState, states_of_all
from oreal_megatron.rollout.sample_call import SampleCall
from oreal_megatron.rollout.sampler import Sampler
from oreal_megatron.rollout.sglang_engine import SGLangEngine
from oreal_megatron.stopping import StopRequest
from oreal_megatron.types import GradedRollout


class BackgroundSampling:
    """Calls that are sampled while the run trains. Every rank calls every method but `close`."""

    def __init__(self, sampler: Sampler, engine: SGLangEngine, groups: ParallelGroups, stop: StopRequest):
        """Generates nothing yet. sampler: of the engine, with a journal of its own."""
        self.sampler = sampler
        self.engine = engine
        self.waited_seconds = 0.0
        """Seconds for which training stood still since `begin`; see `standstill`."""
        self._groups = groups
        self._stop = stop
        self._batches: list[Batch] = []
        self._generations: dict[SamplingConfig, BackgroundGeneration] = {}
        """Generations by their sampling, on the leading process of a replica."""
        self._started = 0.0

    @property
    def seconds(self) -> float:
        """Seconds since `begin`."""
        return time.perf_counter() - self._started

    def begin(self, calls: Sequence[SampleCall]) -> bool:
        """Takes calls in the place of earlier ones, with what the journal has of them.

        Returns whether there is something to generate, for which `generate` is called once servers have the weights.
        """
        self.close()
        self._started, self.waited_seconds = time.perf_counter(), 0.0
        self._batches, num_todo = [], 0
        for call in calls:
            finished = self.sampler.journalled(call)
            known = self._groups.from_main(set(finished))
            todo = [index for index in range(len(call.units)) if index not in known]
            mine = todo[self._groups.data_rank :: self._groups.data_size] if self._groups.leads_replica else []
            prompts = [prompt for prompt, _ in call.asked]
            self._batches.append(Batch(step=0, prompts=prompts, call=call, mine=mine, finished=finished, partial={}))
            num_todo += len(todo)
        return num_todo > 0

    def generate(self) -> None:
        """Has the servers generate what the journal did not have."""
        for batch in (batch for batch in self._batches if batch.mine):
            sampling = batch.call.sampling
            if sampling not in self._generations:
                self._generations[sampling] = BackgroundGeneration(self.engine, self.sampler, sampling)
            self._generations[sampling].add([batch])

    def publish(self, send: Callable[[], object]) -> None:
        """Sends the servers weights by `send`, after which a server has them; responses under way wait for them."""
        with contextlib.ExitStack() as publications:
            for generation in self._generations.values():
                publications.enter_context(generation.publication())
            send()

    def wait(self, seconds: float) -> list[ProcessState]:
        """Returns the states of all processes once the calls are complete on this one, or after `seconds`.

        Raises:
            NoServerError, ValueError, OSError, RuntimeError: on every rank, the first error in the background.
        """
        deadline = time.perf_counter() + seconds
        for sampling, generation in self._generations.items():
            generation.wait(lambda s=sampling: self._need_no_wait(s), max(deadline - time.perf_counter(), 0.0))
        generations = self._generations.values()
        state = ProcessState(
            is_done=all(batch.is_graded for batch in self._batches),
            has_no_weights=any(generation.has_no_weights for generation in generations),
            is_stopped=self._stop.is_made,
            error=next((each.error for each in generations if each.error is not None), None),
        )
        return states_of_all(self._groups, state)

    def results(self) -> list[list[list[GradedRollout]]]:
        """Returns the groups of every call, once the calls are complete; tokens, on the main rank alone."""
        return [self.sampler.complete_groups(batch.call, batch.finished) for batch in self._batches]

    @contextlib.contextmanager
    def standstill(self) -> Iterator[None]:
        """Counts the seconds of the block as time for which training stands still."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.waited_seconds += time.perf_counter() - start

    def close(self) -> None:
        """Ends generation and grading, also after an error; not a collective."""
        for generation in self._generations.values():
            generation.close()
        self._generations = {}

    def _need_no_wait(self, sampling: SamplingConfig) -> bool:
        """Returns whether the generation by `sampling` is complete, or waits for weights."""
        if self._generations[sampling].has_no_weights:
            return True
        return all(batch.is_graded for batch in self._batches if batch.call.sampling == sampling)
