"""Rollouts ahead of training: servers generate for later steps while the trainer works on an earlier step.

The prompts of a step are a batch, drawn in the order of the steps and trained in that order, whichever responses come
first; so a short response has no advantage over a long one. At step s the servers have batches s to s + the bound of
staleness, and responses stay at the servers over a publication. Two properties follow:

- A batch is drawn at most as many steps before it trains as the bound says, and a step makes one update at most, so no
  token is older than the bound.
- Every collective is called by the main thread, between two phases of a step. What runs in the background of the
  leading process of a replica (`BackgroundGeneration`) does not wait for another process.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence

from oreal_megatron.checkpoint.store import step_name
from oreal_megatron.config.rollout import RolloutConfig
from oreal_megatron.distributed.groups import ParallelGroups
from oreal_megatron.rollout.background import BackgroundGeneration, Batch, ProcessState, states_of_all
from oreal_megatron.rollout.response_limits import limits_of_step
from oreal_megatron.rollout.sample_call import SampleCall, can_go_on, staleness
from oreal_megatron.rollout.sampler import Sampler, SampleResult, rollout_seeds
from oreal_megatron.rollout.sglang_engine import SGLangEngine
from oreal_megatron.stopping import LostPeer, Stopped, StopRequest
from oreal_megatron.types import Completion, Prompt, Rollout

logger = logging.getLogger(__name__)

_KEEP_SECONDS = 10.0
"""Seconds in which servers have to return what they have of unfinished responses when the run ends."""


class RolloutsAhead:
    """Batches of rollouts for the present step and later steps. Every rank calls every method but `close`."""

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
        self._batches: deque[Batch] = deque()
        self._background = BackgroundGeneration(engine, sampler, config.sampling) if groups.leads_replica else None
        self._is_generating = False
        self._discarded_tokens = 0
        self._last_take: float | None = None

    @property
    def batch_names(self) -> list[str]:
        """Names of the batches that are drawn, in the journal."""
        return [batch.call.batch_name for batch in self._batches]

    def waiting(self, step: int) -> list[Prompt]:
        """Returns the prompts that are drawn for `step` and later steps, in their order."""
        return [prompt for batch in self._batches if batch.step >= step for prompt in batch.prompts]

    def begin(self, step: int, draw: Callable[[], list[Prompt]]) -> None:
        """Has the servers generate for `step`, which is the next to train, and for as many later steps as may be.

        draw: returns the next step's prompts.

        Raises:
            ValueError: a prompt leaves no room for a response.
        """
        if self._last_take is None:
            self._last_take = time.perf_counter()
        while self._batches and self._batches[0].step < step:
            self._batches.popleft()
        new = self._admitted(step, draw)
        self._batches += new
        self._generate(new if self._is_generating else self._batches)

    def take(self, step: int, draw: Callable[[], list[Prompt]]) -> SampleResult:
        """Returns the graded groups of a step, while the servers go on generating for later steps.

        The prompts of the step stay among those of `waiting` until the next step. The policy has the weights of the
        last publication. draw: see `begin`.

        Raises:
            Stopped: a stop was asked for; finished units are in the journal, and `keep` keeps what there is of others.
            NoServerError, ValueError: see RolloutEngine. OSError: the journal cannot be written.
        """
        self.begin(step, draw)
        batch = self._batches[0]
        assert batch.step == step
        while True:
            states = self._wait(lambda: batch.is_graded)
            if any(state.is_stopped for state in states):
                raise Stopped(
                    f"stopped while {batch.call.batch_name} was generated: finished rollouts are in the journal, the "
                    "same command goes on with the others"
                )
            is_done = all(state.is_done for state in states)
            if any(state.has_no_weights for state in states):
                self._end()
                self._engine.resend(wait=not is_done)
                self._generate(self._batches)
            if is_done:
                break
        metrics = {
            "rollout/discarded_tokens": float(self._discarded_tokens),
            "rollout/groups_ahead": float(sum(state.num_ready for state in states)),
            "rollout/server_idle_share": self._idle_share(max(state.busy_seconds for state in states)),
        }
        self._discarded_tokens = 0
        groups = self._sampler.complete_groups(batch.call, batch.finished)
        metrics |= staleness(groups, self._engine.weight_version)
        return SampleResult(groups=groups, unfinished=[], metrics=metrics)

    def settle(self) -> None:
        """Waits until the next step's responses are there under one_ahead, so that new weights can be published.

        Other responses go on under the new weights, and so do those of one_ahead after a request to stop, or where no
        server has the current weights, which end the wait. Grading goes on.

        Raises:
            NoServerError, ValueError, OSError: see `take`.
        """
        is_waiting = self._is_generating and self._config.schedule == "one_ahead"
        if is_waiting and not self._groups.any_rank(self._stop.is_made):
            self._wait(lambda: all(batch.is_served for batch in self._batches))

    def publish(self, weight_version: int) -> dict[str, float]:
        """Publishes as SGLangEngine does; its seconds count as time without a request at a server."""
        with contextlib.nullcontext() if self._background is None else self._background.publication():
            return self._engine.publish(weight_version)

    def pause(self) -> None:
        """Ends generation after `settle` and waits for the grades, so that something else is generated and graded.

        A request to stop ends the wait at once. What is unfinished goes on with the next `begin`.

        Raises:
            NoServerError, ValueError, OSError: see `take`.
        """
        self.settle()
        if self._is_generating:
            self._end()
        self._wait(lambda: not any(batch.ungraded for batch in self._batches))

    def prepare(self, weight_version: int) -> None:
        """See SGLangEngine."""
        self._engine.prepare(weight_version)

    def keep(self) -> None:
        """Ends generation, and keeps all responses without grades in the journal, finished or not.

        The next start goes on from them, as far as the bound allows. An error of the generation is logged: the run ends
        for another reason.

        Raises:
            OSError: the journal cannot be written.
        """
        background = self._background
        if background is not None:
            background.stop_grading()
            background.cancel_after(_KEEP_SECONDS)
        try:
            self._end()
        except LostPeer:
            raise
        except (OSError, ValueError, RuntimeError) as error:
            logger.warning("the end of the rollouts ahead: %s", error)
        for batch in self._batches:
            mine = {} if background is None else background.ungraded_responses(batch)
            responses = {at: response for part in self._groups.gather_to_main(mine) for at, response in part.items()}
            with self._groups.together():
                if responses:
                    self._sampler.journal.keep_partial(batch.call.batch_name, responses)

    def close(self) -> None:
        """Ends generation and grading, also after an error; not a collective."""
        if self._background is not None:
            self._background.close()

    def _admitted(self, step: int, draw: Callable[[], list[Prompt]]) -> list[Batch]:
        """Draws the batches that the bound allows at `step` and that are not drawn yet."""
        batches = []
        for later in range(step + len(self._batches), min(step + self._config.staleness_bound + 1, self._num_steps)):
            prompts = draw()
            call = self._sampler.call(
                prompts,
                batch_name=step_name(later),
                num_samples=self._config.samples_per_prompt,
                sampling=self._config.sampling,
                seed_of=rollout_seeds(self._run_seed, "train", later),
                limits_of=limits_of_step(self._config.sampling, later),
                weight_version=None,
            )
            batches.append(self._batch_of(later, prompts, call, num_updates=later - step))
        return batches

    def _batch_of(self, step: int, prompts: Sequence[Prompt], call: SampleCall, *, num_updates: int) -> Batch:
        """Returns a batch with what the journal has of it. num_updates: the most that follow until it trains."""
        now = self._engine.weight_version
        oldest = now + num_updates - self._config.staleness_bound

        def is_usable(rollout: Rollout) -> bool:
            """Whether all tokens are within the bound; later weights than those of the step are another past's."""
            return all(oldest <= span.version <= now + num_updates for span in rollout.weight_spans)

        journalled = self._sampler.journalled(call)
        finished = {i: unit for i, unit in journalled.items() if all(is_usable(one.rollout) for one in unit)}
        begun = self._begun(call, without=finished)
        partial = {
            i: response
            for i, response in begun.items()
            if all(oldest <= span.version <= now for span in response.weight_spans)
        }
        discarded = sum(one.rollout.num_response_tokens for i in journalled.keys() - finished for one in journalled[i])
        discarded += sum(len(begun[i].token_ids) for i in begun.keys() - partial)
        known, has_partial, discarded = self._groups.from_main((set(finished), bool(partial), discarded))
        self._discarded_tokens += discarded
        todo = [index for index in range(len(call.units)) if index not in known]
        of_replica = [todo[replica :: self._groups.data_size] for replica in range(self._groups.data_size)]
        if has_partial:
            parts = [
                {i: partial[i] for index in mine for i in call.units[index] if i in partial} for mine in of_replica
            ]
            partial = self._groups.scatter_from_main(parts)
        mine = call.longest_first(of_replica[self._groups.data_rank])
        return Batch(step=step, prompts=prompts, call=call, mine=mine, finished=finished, partial=partial)

    def _begun(self, call: SampleCall, *, without: Collection[int]) -> dict[int, Completion]:
        """Returns the responses of a call that `keep` has kept, by the index of their request; on the main rank.

        A response above its limit, which a function of the user's own lowered since, is not used. without: units that
        need no response.
        """
        kept = self._sampler.journal.partial(call.batch_name)
        asked = [(i, call.asked[i]) for index, unit in enumerate(call.units) if index not in without for i in unit]
        begun = {i: kept[prompt.id, sample] for i, (prompt, sample) in asked if (prompt.id, sample) in kept}
        return {i: part for i, part in begun.items() if can_go_on(part, call.requests[i].max_new_tokens)}

    def _generate(self, batches: Sequence[Batch]) -> None:
        """Has the servers generate what is unserved of batches, behind what they generate already."""
        self._is_generating = True
        if self._background is not None:
            self._background.add(batches)

    def _end(self) -> None:
        """Ends generation; responses that are unfinished are kept in memory."""
        background = self._background
        if background is not None:
            background.end()
        self._wait(lambda: background is None or not background.is_running, until_end=True)
        self._is_generating = False

    def _idle_share(self, busy_seconds: float) -> float:
        """Returns the share of the time since the last call, or the first `begin`, without a request at a server."""
        assert self._last_take is not None
        now = time.perf_counter()
        seconds, self._last_take = now - self._last_take, now
        if self._background is not None:
            self._background.reset_busy_seconds()
        return max(1.0 - busy_seconds / seconds, 0.0)

    def _wait(self, is_done: Callable[[], bool], *, until_end: bool = False) -> list[ProcessState]:
        """Returns the states of all processes once `is_done` is true on every leading process, or can wait no longer.

        That is where a stop is asked for, or servers wait for weights that no server has; until_end: wait in these
        cases too. Waiting processes repeat short collectives: none of them exceeds its timeout however long generation
        takes, and a signal is noticed, whose handler cannot run inside a collective.

        Raises:
            NoServerError, ValueError, OSError, RuntimeError: on every rank, the first error in the background.
            LostPeer: another rank of the job has failed.
        """
        while True:
            state = ProcessState(is_stopped=self._stop.is_made)
            if (background := self._background) is not None:
                state = ProcessState(
                    is_done=background.wait(
                        lambda: is_done() or (background.has_no_weights and not until_end),
                        self._engine.heartbeat_seconds,
                    )
                    and is_done(),
                    has_no_weights=background.has_no_weights,
                    is_stopped=self._stop.is_made,
                    error=background.error,
                    num_ready=sum(batch.num_graded for batch in list(self._batches)[1:]),
                    busy_seconds=background.busy_seconds(),
                )
            states = states_of_all(self._groups, state)
            must_end = any(state.is_stopped or state.has_no_weights for state in states)
            if all(state.is_done for state in states) or (must_end and not until_end):
                return states
            self._groups.check_others()
