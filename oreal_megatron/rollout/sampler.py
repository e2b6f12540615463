"""Prompts to groups of graded rollouts, through any engine, with a journal under it."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from oreal_megatron.config import SamplingConfig
from oreal_megatron.data.prompting import PromptRenderer
from oreal_megatron.distributed.groups import ParallelGroups
from oreal_megatron.rollout.engine import RolloutEngine
from oreal_megatron.rollout.journal import PartialResponses, RolloutJournal, unit_key
from oreal_megatron.seeds import derive_seed
from oreal_megatron.stopping import Stopped, StopRequest
from oreal_megatron.types import (
    Completion,
    FinishReason,
    GenerationRequest,
    Grade,
    GradedRollout,
    GradeRequest,
    Prompt,
    Rollout,
)

Grader = Callable[[Sequence[GradeRequest]], list[Grade]]
StepTimer = Callable[[str], AbstractContextManager[None]]


@dataclass(frozen=True, kw_only=True)
class EarlyStop:
    """When a step has enough rollouts, and what becomes of the rest."""

    num_groups: int
    counts: Callable[[Sequence[GradedRollout]], bool]
    """Whether a complete group is one of them."""
    max_age: int
    """Policy updates that the weights of a token may be behind when its response goes on."""
    next_batch: str
    """The purpose that goes on with what is broken off."""


@dataclass(frozen=True, kw_only=True)
class SampleResult:
    """Groups that are complete, and prompts whose groups are not, both in the order of the prompts."""

    groups: list[list[GradedRollout]]
    unfinished: list[Prompt]
    metrics: Mapping[str, float]


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
        batch_name: str,
        num_samples: int,
        sampling: SamplingConfig,
        seed_of: Callable[[Prompt, int], int],
        clock: StepTimer = lambda phase: contextlib.nullcontext(),
        early_stop: EarlyStop | None = None,
    ) -> SampleResult:
        """A group of `num_samples` graded rollouts a prompt, on every rank.

        purpose: names the journal's files, `step_000003`. seed_of: (prompt, sample index) -> seed; see `rollout_seeds`.
        clock: times the phases generate and verify. enough: when to break off; what is under way then is kept for
        `enough.rest_is_for`. A call that is repeated after a kill, when it had enough, has the same groups again.

        Raises:
            Stopped: a stop was asked for; what was finished until then is in the journal.
            ValueError: a prompt leaves no room for a response.
            OSError: the journal cannot be written.
        """
        partial, figures = ({}, {}) if early_stop is None else self._partial(batch_name, early_stop.max_age)
        asked = [(prompt, index) for prompt in prompts for index in range(num_samples)]
        requests = [
            self._request(prompt, seed_of(prompt, index), sampling, partial.get((prompt.id, index)))
            for prompt, index in asked
        ]
        call = _SampleCall(self._engine, batch_name, asked, requests, sampling)
        tally = None if early_stop is None else _Tally(self._groups, early_stop)
        todo, finished = self._todo(call, tally)
        broken_off = self._generate(call, todo, finished, tally, clock)
        parts = [part[0] for part in self._groups.gather_over_world([(finished, broken_off)])]
        by_prompt = call.by_prompt({index: unit for units, _ in parts for index, unit in units.items()})
        groups = [by_prompt[prompt.id] for prompt in prompts if prompt.id in by_prompt]
        if early_stop is not None:
            rest = {at: completion for _, some in parts for at, completion in some.items()}
            if todo:  # else a killed process has kept it already
                self._keep(rest, early_stop.next_batch)
            figures |= {
                "rollout/asked_groups": float(len(prompts)),
                "rollout/unfinished_groups": float(len(prompts) - len(groups)),
                "rollout/unfinished_tokens": float(sum(len(completion.token_ids) for completion in rest.values())),
                **_ages(groups, self._engine.weight_version),
            }
        unfinished = [prompt for prompt in prompts if prompt.id not in by_prompt]
        return SampleResult(groups=groups, unfinished=unfinished, metrics=figures)

    def _partial(self, batch_name: str, max_age: int) -> tuple[PartialResponses, dict[str, float]]:
        """What earlier steps have of this one's responses, and figures; what is too old is left out."""
        kept = self._groups.from_main(self.journal.partial(batch_name))
        oldest = self._engine.weight_version - max_age
        partial = {at: c for at, c in kept.items() if c.weight_spans[0].version >= oldest}
        num_tokens = sum(len(c.token_ids) for c in partial.values())
        return partial, {
            "rollout/carried_responses": float(len(partial)),
            "rollout/carried_tokens": float(num_tokens),
            "rollout/discarded_tokens": float(sum(len(c.token_ids) for c in kept.values()) - num_tokens),
        }

    def _keep(self, rest: PartialResponses, batch_name: str) -> None:
        with self._groups.together():
            if self._groups.is_main:
                self.journal.keep_partial(
                    batch_name, {at: completion for at, completion in rest.items() if completion.token_ids}
                )

    def _todo(self, call: _SampleCall, tally: _Tally | None) -> tuple[list[int], dict[int, list[GradedRollout]]]:
        """Units to generate, the same on every rank; and those that are journalled, on the main one."""
        journalled = self.journal.read(call.batch_name)
        finished = {index: journalled[key] for index, key in enumerate(call.keys) if key in journalled}
        if tally is not None:
            tally.add(finished.values())
        had_enough = tally is not None and tally.is_enough()
        known, had_enough = self._groups.from_main((set(finished), had_enough))
        return ([] if had_enough else [index for index in range(len(call.units)) if index not in known]), finished

    def _generate(
        self,
        call: _SampleCall,
        todo: Sequence[int],
        finished: dict[int, list[GradedRollout]],
        tally: _Tally | None,
        clock: StepTimer,
    ) -> dict[tuple[str, int], Completion]:
        """Adds this replica's units to `finished`, on its leading rank; returns the responses of those that are not."""
        mine = todo[self._groups.data_rank :: self._groups.data_size]
        broken_off: dict[tuple[str, int], Completion] = {}
        is_enough = None if tally is None else tally.is_enough
        work = self._engine.generate([call.unit(index) for index in mine], call.sampling, is_enough)
        while not self._groups.any_of_replica(self._stop.is_made):
            with clock("generate"):
                position, completions = next(work, (None, []))
            if position is None:
                break
            index = mine[position]
            answered = list(zip(call.units[index], completions, strict=True))
            if any(completion.finish_reason is None for completion in completions):
                broken_off |= {(call.asked[i][0].id, call.asked[i][1]): completion for i, completion in answered}
                continue
            rollouts = [self._rollout(*call.asked[i], call.requests[i], completion) for i, completion in answered]
            if self._groups.leads_replica:
                with clock("verify"):
                    finished[index] = self._graded(rollouts)
                self.journal.append(call.batch_name, call.keys[index], finished[index])
                if tally is not None:
                    tally.add([finished[index]])
        if self._groups.any_rank(self._stop.is_made):
            raise Stopped(
                f"stopped while {call.batch_name} was generated: finished rollouts are in the journal, the same "
                "command goes on with the others"
            )
        return broken_off

    def _request(
        self, prompt: Prompt, seed: int, sampling: SamplingConfig, partial: Completion | None
    ) -> GenerationRequest:
        prompt_ids = self._renderer.token_ids(prompt)
        room = self._max_sequence_length - len(prompt_ids)
        if room < 1:
            raise ValueError(
                f"prompt {prompt.id} has {len(prompt_ids)} tokens and leaves no room for a response in "
                f"model.max_sequence_length = {self._max_sequence_length}"
            )
        limit = min(room, sampling.max_new_tokens)
        return GenerationRequest(prompt_ids=prompt_ids, seed=seed, max_new_tokens=limit, partial=partial)

    def _rollout(
        self, prompt: Prompt, sample_index: int, request: GenerationRequest, completion: Completion
    ) -> Rollout:
        assert completion.finish_reason is not None
        return Rollout(
            prompt=prompt,
            sample_index=sample_index,
            prompt_ids=request.prompt_ids,
            response_ids=completion.token_ids,
            logprobs=completion.logprobs,
            text=self._renderer.response_text(completion.token_ids),
            finish_reason=completion.finish_reason,
            weight_spans=completion.weight_spans,
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


class _SampleCall:
    """What one call asks the engine for."""

    def __init__(
        self,
        engine: RolloutEngine,
        batch_name: str,
        asked: Sequence[tuple[Prompt, int]],
        requests: Sequence[GenerationRequest],
        sampling: SamplingConfig,
    ):
        """asked: prompt and sample index of every request."""
        self.batch_name, self.asked, self.requests, self.sampling = batch_name, asked, requests, sampling
        self.units = engine.units(requests)
        self.keys = [
            unit_key([asked[i][0] for i in unit], [requests[i] for i in unit], sampling, engine.weight_version)
            for unit in self.units
        ]

    def unit(self, index: int) -> list[GenerationRequest]:
        return [self.requests[i] for i in self.units[index]]

    def by_prompt(self, graded: Mapping[int, Sequence[GradedRollout]]) -> dict[str, list[GradedRollout]]:
        """Groups by prompt id, of graded units; those that are complete."""
        at = {i: one for index, unit in graded.items() for i, one in zip(self.units[index], unit, strict=True)}
        places: dict[str, list[int]] = {}
        for i, (prompt, _) in enumerate(self.asked):
            places.setdefault(prompt.id, []).append(i)
        return {id: [at[i] for i in group] for id, group in places.items() if all(i in at for i in group)}


class _Tally:
    """How many groups of use all replicas have between them."""

    def __init__(self, groups: ParallelGroups, early_stop: EarlyStop):
        self._groups, self._enough = groups, early_stop
        self._name = f"enough/{groups.from_main(uuid.uuid4().hex)}"

    def add(self, units: Iterable[Sequence[GradedRollout]]) -> None:
        """Takes graded units, each of whole groups."""
        useful = 0
        for unit in units:
            by_prompt: dict[str, list[GradedRollout]] = {}
            for graded in unit:
                by_prompt.setdefault(graded.rollout.prompt.id, []).append(graded)
            useful += sum(self._enough.counts(group) for group in by_prompt.values())
        self._groups.count(self._name, useful)

    def is_enough(self) -> bool:
        return self._groups.count(self._name) >= self._enough.num_groups


def _ages(groups: Sequence[Sequence[GradedRollout]], version: int) -> dict[str, float]:
    """How old the weights are that generated the groups' tokens, at weight version `version`."""
    rollouts = [graded.rollout for group in groups for graded in group]
    num_tokens = sum(len(rollout.response_ids) for rollout in rollouts)
    older = sum(rollout.num_older_tokens(version) for rollout in rollouts)
    oldest = min((rollout.weight_spans[0].version for rollout in rollouts), default=version)
    return {"rollout/older_tokens": older / max(num_tokens, 1), "rollout/oldest_updates": float(version - oldest)}


def rollout_seeds(run_seed: int, phase: str, step: int) -> Callable[[Prompt, int], int]:
    """Seeds that depend on (run seed, purpose, step, prompt, sample) and on nothing else."""
    return lambda prompt, index: derive_seed(run_seed, phase, step, prompt.id, index)
