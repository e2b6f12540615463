"""Prompts to groups of graded rollouts, through any engine, with a journal under it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from oreal_megatron.config import SamplingConfig
from oreal_megatron.data.prompting import PromptRenderer
from oreal_megatron.parallel.groups import ParallelGroups
from oreal_megatron.records import FinishReason, Grade, GradedRollout, GradeRequest, Prompt, Rollout
from oreal_megatron.rollout.engine import Completion, GenerationRequest, RolloutEngine
from oreal_megatron.rollout.journal import RolloutJournal, unit_key
from oreal_megatron.seeds import derive_seed
from oreal_megatron.stopping import Stopped, StopRequest

Grader = Callable[[Sequence[GradeRequest]], list[Grade]]
Clock = Callable[[str], AbstractContextManager[None]]


class Sampler:
    """Renders prompts, asks the engine for responses, has them graded, and journals every finished unit.

    Units are dealt over model replicas; which one generates a unit changes nothing about it.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        renderer: PromptRenderer,
        grade: Grader,
        journal: RolloutJournal,
        groups: ParallelGroups,
        stop: StopRequest,
        *,
        max_sequence_length: int,
    ):
        """grade: called by the leading process of each replica, for the replica's own rollouts."""
        self.journal = journal
        self._engine = engine
        self._renderer = renderer
        self._grade = grade
        self._groups = groups
        self._stop = stop
        self._max_sequence_length = max_sequence_length

    def sample(
        self,
        prompts: Sequence[Prompt],
        *,
        purpose: str,
        num_samples: int,
        sampling: SamplingConfig,
        seed_of: Callable[[Prompt, int], int],
        clock: Clock = lambda phase: contextlib.nullcontext(),
    ) -> list[list[GradedRollout]]:
        """A group of `num_samples` graded rollouts a prompt, in order, on every rank.

        purpose: names the journal's files, `step_000003`. seed_of: (prompt, sample index) -> seed; see `rollout_seeds`.
        clock: times the phases generate and verify.

        Raises:
            Stopped: a stop was asked for; what was finished until then is in the journal.
            ValueError: a prompt leaves no room for a response.
            OSError: the journal cannot be written.
        """
        asked = [(prompt, index) for prompt in prompts for index in range(num_samples)]
        requests = [self._request(prompt, seed_of(prompt, index), sampling) for prompt, index in asked]
        units = self._engine.units(requests)
        keys = [
            unit_key([asked[i][0] for i in unit], [requests[i] for i in unit], sampling, self._engine.weight_version)
            for unit in units
        ]
        journalled = self.journal.read(purpose)
        known = self._groups.from_main(set(journalled))
        todo = [index for index, key in enumerate(keys) if key not in known]
        mine = todo[self._groups.data_rank :: self._groups.data_size]

        finished = {index: journalled[key] for index, key in enumerate(keys) if key in journalled}
        work = self._engine.generate([[requests[i] for i in units[index]] for index in mine], sampling)
        while not self._groups.any_of_replica(self._stop.is_made):
            with clock("generate"):
                position, completions = next(work, (None, []))
            if position is None:
                break
            index = mine[position]
            rollouts = [
                self._rollout(*asked[i], requests[i], c) for i, c in zip(units[index], completions, strict=True)
            ]
            if self._groups.leads_replica:
                with clock("verify"):
                    finished[index] = self._graded(rollouts)
                self.journal.append(purpose, keys[index], finished[index])
        if self._groups.any_rank(self._stop.is_made):
            raise Stopped
        graded = {index: unit for part in self._groups.gather_over_world([finished]) for index, unit in part[0].items()}
        in_order = {i: one for index, unit in graded.items() for i, one in zip(units[index], unit, strict=True)}
        return [
            [in_order[start + index] for index in range(num_samples)] for start in range(0, len(asked), num_samples)
        ]

    def _request(self, prompt: Prompt, seed: int, sampling: SamplingConfig) -> GenerationRequest:
        prompt_ids = self._renderer.token_ids(prompt)
        room = self._max_sequence_length - len(prompt_ids)
        if room < 1:
            raise ValueError(
                f"prompt {prompt.id} has {len(prompt_ids)} tokens and leaves no room for a response in "
                f"model.max_sequence_length = {self._max_sequence_length}"
            )
        return GenerationRequest(prompt_ids=prompt_ids, seed=seed, max_new_tokens=min(room, sampling.max_new_tokens))

    def _rollout(
        self, prompt: Prompt, sample_index: int, request: GenerationRequest, completion: Completion
    ) -> Rollout:
        return Rollout(
            prompt=prompt,
            sample_index=sample_index,
            prompt_ids=request.prompt_ids,
            response_ids=completion.token_ids,
            logprobs=completion.logprobs,
            text=self._renderer.response_text(completion.token_ids),
            finish_reason=completion.finish_reason,
            weight_version=completion.weight_version,
        )

    def _graded(self, rollouts: Sequence[Rollout]) -> list[GradedRollout]:
        grades = self._grade(
            [
                GradeRequest(
                    question=rollout.prompt.question,
                    gold_answer=rollout.prompt.gold_answer,
                    response=rollout.text,
                    stopped=rollout.finish_reason is FinishReason.STOP,
                )
                for rollout in rollouts
            ]
        )
        return [GradedRollout(rollout=rollout, grade=grade) for rollout, grade in zip(rollouts, grades, strict=True)]


def rollout_seeds(run_seed: int, purpose: str, step: int) -> Callable[[Prompt, int], int]:
    """Seeds that depend on (run seed, purpose, step, prompt, sample) and on nothing else."""
    return lambda prompt, index: derive_seed(run_seed, purpose, step, prompt.id, index)
