"""The training of a run, top to bottom: `train` is the loop, `train_step` one step."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from oreal_megatron.background_evaluation import begin_evaluation, end_evaluation, pending_step, resume_evaluation
from oreal_megatron.checkpoint.store import step_name
from oreal_megatron.config import TrainConfig
from oreal_megatron.data.packing import PackedSequence, TokenBatch
from oreal_megatron.distributed.profiling import gather_timeline, profiled
from oreal_megatron.distributed.step_timer import StepTimer
from oreal_megatron.evaluation import areas_under_curve, evaluate_run, note_score
from oreal_megatron.losses.advantages import (
    Selection,
    select_trajectories,
    selects_by_functions,
    used_responses,
)
from oreal_megatron.losses.policy_terms import TokenCounts
from oreal_megatron.metrics import rollout_metrics
from oreal_megatron.models.trained_model import TrainedModel
from oreal_megatron.policy_updates import (
    Minibatch,
    all_batches,
    split_into_minibatches,
    update_policy_in_minibatches,
    with_batches,
)
from oreal_megatron.run_state import Run, restore, save
from oreal_megatron.seeds import derive_seed
from oreal_megatron.servers.request_queue import NoServerError
from oreal_megatron.step import (
    ScoredSequences,
    UpdateRefused,
    over_all_ranks,
    score_sequences,
    update_reward_model,
    with_reference,
    with_token_weights,
)
from oreal_megatron.step_rollouts import begin_ahead, keep_ahead, pause_ahead, published, replayed, rolled_out
from oreal_megatron.stopping import Stopped, TooManyUndecided
from oreal_megatron.supervised import update_supervised
from oreal_megatron.trajectories import to_records
from oreal_megatron.types import GradedRollout, StepReport, Trajectory

logger = logging.getLogger(__name__)


def train(run: Run) -> None:
    """Trains from the newest checkpoint, if there is one, to the last step; evaluates and saves on the way.

    Raises:
        UpdateRefused: a loss is not a finite number, or the rollouts' log-probabilities are not the policy's, beyond
            rollout.mismatch.stop; the message names step, terms and samples. Checkpoints stay.
        TooManyUndecided: see rollout.undecided.stop; everything until then is saved.
        Stopped: a stop was asked for; everything until then is saved.
        OSError: the disk refused; the message says which checkpoints are whole.
    """
    is_resumed = restore(run)
    progress, step_of_mode = run.progress, supervised_step if run.config.is_sft else train_step
    if is_resumed:
        with run.policy.on_device():
            run.engine.publish(progress.weight_version)
    is_evaluated = progress.evaluated_step == progress.step
    run.tracker.start(progress.step, is_evaluated=is_evaluated, pending_evaluation=pending_step(run))
    try:
        resume_evaluation(run)
        evaluate_and_save(run)
        with run.tracker.progress("steps", run.num_steps, completed=progress.step) as bar:
            while progress.step < run.num_steps:
                if run.groups.any_rank(run.stop.is_made):
                    raise Stopped("stopped between two steps")
                step = progress.step
                run.timeline.begin(step)
                profiling = profiled(run.directory, run.config.tracking, step=step, rank=run.groups.rank)
                with profiling, run.timeline.recorded(f"step {step}"):
                    report = step_of_mode(run)
                run.tracker.step(report)
                bar.advance()
                progress.step += 1
                run.store.finish(wait=False)
                evaluate_and_save(run)
                gather_timeline(run.timeline, run.groups, step=step)
        if not run.num_steps:
            logger.info("run.num_steps = 0: nothing is trained")
    except (Stopped, TooManyUndecided) as ending:
        keep_ahead(run)
        save(run, wait=True)
        if isinstance(ending, Stopped):
            raise Stopped(where_stopped(run)) from None
        raise
    except UpdateRefused:
        run.store.finish(wait=True)
        raise
    run.tracker.finish_trajectories()
    run.store.finish(wait=True)


def where_stopped(run: Run) -> str:
    """Says after how many steps the run stopped, and what is saved of it."""
    step = run.progress.step
    saved = f"checkpoint {step_name(step)} is saved" if run.store.has(step_name(step)) else "nothing was trained"
    rollouts = "" if run.config.is_sft else ", finished rollouts are in the journal"
    return f"stopped after {step} steps: {saved}{rollouts}; the same command goes on"


def train_step(run: Run) -> StepReport:
    """Runs one step: prompts, rollouts, graded groups, trajectories, both updates, published weights.

    Raises:
        UpdateRefused: see `train`; the message names the step.
        Stopped: a stop was asked for while responses were generated.
    """
    config, step, clock = run.config, run.progress.step, StepTimer(run.timeline.phase)
    run.groups.seed_generators(derive_seed(config.run.seed, "generators", step))
    sampled = replayed(run) if config.run.mode == "replay" else rolled_out(run, clock)
    graded = sampled.groups
    selection = selected(run, graded)
    metrics = {**rollout_metrics(graded, selection), **sampled.metrics}
    if config.run.mode == "rollout" or not selection.trajectories:
        skipped = "rollouts only" if config.run.mode == "rollout" else selection.why_unusable
        save_trajectories(run, graded, selection)
        return StepReport(step=step, skipped=skipped, metrics=metrics, **costs(run, clock))

    frozen = run.progress.num_usable_steps < config.objective.actor_freeze_steps
    minibatches = packed_minibatches(run, selection.trajectories)
    batches = all_batches(minibatches)
    try:
        if not frozen:
            assert run.reference is not None
            with clock("score"), run.reference.on_device():
                batches = with_reference(run.reference.module, batches, run.groups)
        scored = None
        if run.reward_model is not None:
            with clock("reward_model"), run.reward_model.on_device():
                scored, more = train_reward_model(run, run.reward_model, graded, selection, batches)
            metrics |= more
        batches = with_token_weights(batches, scored, config.objective, run.groups)
        if not frozen:
            with clock("policy"), run.policy.on_device():
                minibatches = with_batches(minibatches, batches)
                metrics |= update_policy_in_minibatches(
                    run.policy, minibatches, config.objective, max_mismatch=max_mismatch(config)
                )
        elif config.objective.policy_schedule == "from_first_step":
            run.policy.advance_schedule(config.objective.updates.number)
    except UpdateRefused as error:
        raise UpdateRefused(f"step {step}: {error}") from error
    if not frozen:
        run.progress.weight_version += 1
        metrics |= published(run, clock)
        if run.evaluation is not None or not is_evaluated_after(run, step + 1):
            begin_ahead(run, step + 1)
        warn_of_mismatch(run, metrics)
    run.progress.num_usable_steps += 1
    save_trajectories(run, graded, selection, batches)
    metrics["policy/frozen"] = float(frozen)
    return StepReport(step=step, metrics=metrics, **costs(run, clock))


def selected(run: Run, graded: Sequence[Sequence[GradedRollout]]) -> Selection:
    """Returns the selection of the step, the same on every rank: whole on the main rank, elsewhere without tokens."""
    objective = run.config.objective

    def select() -> Selection:
        seed, step = run.config.run.seed, run.progress.step
        return select_trajectories(graded, objective, seed=seed, step=step, global_rng=run.global_rng)

    if not selects_by_functions(objective):
        return select()
    # The user's functions may read texts and tokens, which the main rank alone has.
    found: tuple[Selection, list[Trajectory]] | None = None
    with run.groups.together():
        if run.groups.is_main:
            selection = select()
            light = [replace(one, rollout=one.rollout.without_tokens()) for one in selection.trajectories]
            found = (replace(selection, trajectories=()), light)
    counts, light = run.groups.from_main(found)
    return selection if run.groups.is_main else replace(counts, trajectories=tuple(light))


def supervised_step(run: Run) -> StepReport:
    """Runs one step of supervised fine-tuning: an update of the policy on the step's conversations.

    Raises:
        UpdateRefused: the gradient norm is not finite; the message names the step and the conversations.
    """
    assert run.sft is not None
    step, clock = run.progress.step, StepTimer(run.timeline.phase)
    run.groups.seed_generators(derive_seed(run.config.run.seed, "generators", step))
    sequences = run.sft.batch(step)
    with clock("policy"), run.policy.on_device():
        try:
            metrics = update_supervised(run.policy, sequences, run.packer)
        except FloatingPointError as error:
            ids = ", ".join(sequence.id for sequence in sequences)
            raise UpdateRefused(f"step {step}: {error}. Lower sft.optimizer.lr, or look at {ids}") from error
    run.progress.weight_version += 1
    run.progress.num_usable_steps += 1
    metrics["sft/epoch"] = run.sft.stream.epoch_after(step + 1)
    seconds = costs(run, clock)
    metrics["sft/tokens_per_second"] = metrics["sft/tokens"] / seconds["seconds"]["total"]
    return StepReport(step=step, metrics=metrics, **seconds)


def costs(run: Run, clock: StepTimer) -> dict[str, Any]:
    """Returns the step's wall seconds and its peaks of memory in GiB, by phase."""
    return {"seconds": clock.seconds(), "peak_gib": clock.peak_gib(run.groups)}


def packed_minibatches(run: Run, trajectories: Sequence[Trajectory]) -> list[Minibatch]:
    """Returns the step's mini-batches: a single one, or as objective.updates says."""
    number = run.config.objective.updates.minibatches
    seed = derive_seed(run.config.run.seed, "minibatches", run.progress.step)
    return [packed(run, part) for part in split_into_minibatches(trajectories, number, seed=seed)]


def packed(run: Run, trajectories: Sequence[Trajectory]) -> Minibatch:
    """Returns the trajectories' global token counts, and this rank's share of them as micro-batches."""
    # Weight versions of replayed rollouts count another run's updates.
    version = 0 if run.config.run.mode == "replay" else run.progress.weight_version
    sequences = [PackedSequence.from_trajectory(trajectory, weight_version=version) for trajectory in trajectories]
    counts = TokenCounts(
        correct=sum(t.rollout.num_policy_tokens for t in trajectories if t.correct),
        incorrect=sum(t.rollout.num_policy_tokens for t in trajectories if not t.correct),
        limit=len(trajectories) * run.config.rollout.sampling.max_new_tokens,
    )
    as_released = run.config.objective.sampler == "release"
    return counts, run.packer.batches_from_main(sequences, run.groups, as_released=as_released)


def evaluate_and_save(run: Run) -> None:
    """Evaluates and saves where due: before the first step, at the configured intervals, and after the last step.

    With evaluation.servers, an evaluation begins here and the run trains while it is under way.
    """
    config, progress = run.config, run.progress
    if config.run.mode == "rollout":
        return
    step = progress.step
    last = step == run.num_steps
    with saved_if_lost(run):
        end_evaluation(run, wait=False)
    if is_evaluated_after(run, step) and progress.evaluated_step != step:
        if run.evaluation is None:
            evaluate_now(run)
        else:
            with saved_if_lost(run):
                end_evaluation(run, wait=True)
                begin_evaluation(run)
    is_needed = step in (progress.best and progress.best.step, pending_step(run))
    if last or is_multiple(step, config.run.checkpoint_every) or is_needed:
        with run.timeline.recorded("save"):
            save(run, wait=last)
    if last:
        end_evaluation(run, wait=True)
    run.exporter.update()


@contextlib.contextmanager
def saved_if_lost(run: Run) -> Iterator[None]:
    """Saves the run between two steps if the block finds that no server of evaluation is left."""
    try:
        yield
    except NoServerError:
        keep_ahead(run)
        save(run, wait=True)
        raise


def evaluate_now(run: Run) -> None:
    """Evaluates the policy while training waits."""
    progress, step = run.progress, run.progress.step
    pause_ahead(run)
    if run.config.is_sft and run.benchmarks and step:
        with run.policy.on_device():
            run.engine.publish(progress.weight_version)
    with run.timeline.recorded("evaluation"):
        report = evaluate_run(run, step)
    progress.evaluated_step = step
    note_score(run, report)
    begin_ahead(run, step)


def is_evaluated_after(run: Run, num_steps: int) -> bool:
    """Returns whether an evaluation is due after so many steps of the run."""
    config = run.config
    measures = bool(run.benchmarks) or (config.is_sft and config.sft is not None and config.sft.heldout is not None)
    is_due = num_steps in (0, run.num_steps) or is_multiple(num_steps, config.evaluation.every)
    return measures and is_due and config.run.mode != "rollout"


def max_mismatch(config: TrainConfig) -> float | None:
    """Returns rollout.mismatch.stop in nats; None where there is no limit, or rollouts are another policy's."""
    limits = config.rollout.mismatch
    return None if limits is None or config.run.mode == "replay" else limits.stop


def warn_of_mismatch(run: Run, metrics: Mapping[str, float]) -> None:
    """Logs a warning where the mismatch of a step exceeds rollout.mismatch.warn."""
    limits = run.config.rollout.mismatch
    difference = metrics.get("policy/rollout_logprob_difference", 0.0)
    if limits is not None and run.config.run.mode != "replay" and difference > limits.warn:
        logger.warning(
            "step %d: the policy's log-probabilities differ from the rollouts' by %.3g nats in the mean "
            "(rollout.mismatch.warn = %g)",
            run.progress.step,
            difference,
            limits.warn,
        )


def is_multiple(step: int, every: int) -> bool:
    """Returns whether `step` is a multiple of `every`; never where `every` is 0."""
    return every > 0 and step % every == 0


def train_reward_model(
    run: Run,
    reward_model: TrainedModel,
    graded: Sequence[Sequence[GradedRollout]],
    selection: Selection,
    batches: Sequence[TokenBatch],
) -> tuple[ScoredSequences, dict[str, float]]:
    """Updates the reward model as objective.reward_model says.

    batches: micro-batches of the selected trajectories. Returns their scores from before the first update, and metrics.
    """
    config = run.config.objective
    rollouts = [trajectory.rollout for trajectory in selection.trajectories]
    scored, learned = None, batches
    if config.reward_model.responses == "all":
        scored = score_sequences(reward_model.module, batches, config.token_weights.alignment, run.groups)
        everything = [one for group in graded for one in used_responses(group, config)]
        rollouts = [one.rollout for one in everything]
        sequences = [PackedSequence.from_rollout(one.rollout, correct=one.is_correct) for one in everything]
        learned = run.packer.batches_from_main(sequences, run.groups)
    prompt_of = {rollout.id: rollout.prompt.id for rollout in rollouts}
    metrics: dict[str, float] = {}
    for _ in range(config.reward_model.updates):
        before, more = update_reward_model(
            reward_model, learned, config, num_sequences=len(rollouts), prompt_of=prompt_of
        )
        if not metrics:
            scored = scored or before
            metrics = step_aucs(run, learned, before, prompt_of)
        metrics |= more
    assert scored is not None
    return scored, metrics


def step_aucs(
    run: Run, batches: Sequence[TokenBatch], scored: ScoredSequences, prompt_of: Mapping[str, str]
) -> dict[str, float]:
    """Returns the reward model's AUCs on sequences of the step. prompt_of: sequence's id -> prompt's id."""
    ids, scores, outcomes = over_all_ranks(scored, batches, run.groups)
    areas = areas_under_curve(scores, outcomes, [prompt_of[id] for id in ids])
    return {f"reward_model/{name}": value for name, value in areas.items()}


def save_trajectories(
    run: Run, groups: Sequence[Sequence[GradedRollout]], selection: Selection, batches: Sequence[TokenBatch] = ()
) -> None:
    """Writes the step's rollouts with grades, advantages, token weights and scores to trajectories/step_NNNNNN.jsonl.

    The file is written behind the next step, and is waited for before a checkpoint of a later step.
    """
    if not run.config.tracking.trajectories or run.config.run.mode == "replay":
        return

    def by_id(of_batch: Callable[[TokenBatch], Tensor | None]) -> dict[str, np.ndarray]:
        """Returns values [T] of all ranks' sequences by id, on the main rank."""
        mine = [
            (id, values_T.numpy())
            for batch in batches
            if (values_R := of_batch(batch)) is not None
            for id, values_T in zip(batch.ids, batch.split_by_sequence(values_R.cpu()), strict=True)
        ]
        return dict(pair for part in run.groups.gather_to_main(mine) for pair in part)

    records = to_records(
        groups,
        selection.trajectories,
        by_id(lambda batch: batch.token_weights),
        token_scores=by_id(lambda batch: batch.token_scores),
        token_texts=run.renderer.token_texts,
    )
    run.tracker.trajectories(f"trajectories/{step_name(run.progress.step)}", records)
