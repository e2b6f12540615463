"""Evaluations at servers of their own while the run trains (evaluation.servers).

The servers get the weights after a step, by a publication as all others, and keep them until the evaluation of this
step has ended. What the run does about it happens between two steps, on all ranks: an evaluation begins, or its
responses are complete and become its record. A checkpoint names the evaluation that is under way, so that a run which
is stopped or killed ends it at its next start, from the journal and, where responses are missing, with the weights of
that step's checkpoint.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence

from oreal_megatron.checkpoint.state import weights_of_checkpoint
from oreal_megatron.evaluation import (
    Results,
    asked_of,
    benchmarks_metrics,
    evaluate_run,
    evaluation_name,
    note_score,
)
from oreal_megatron.rollout.background_sampling import BackgroundSampling
from oreal_megatron.rollout.sample_call import SampleCall
from oreal_megatron.rollout.sampler import Sampler, rollout_seeds
from oreal_megatron.run_state import PendingEvaluation, Run
from oreal_megatron.stopping import Stopped
from oreal_megatron.types import EvaluationReport, GradedRollout

logger = logging.getLogger(__name__)

_LONG_SECONDS = 1.0
"""Seconds for which training may wait for an evaluation without a warning."""


def pending_step(run: Run) -> int | None:
    """Returns the step whose evaluation is under way."""
    pending = run.progress.pending_evaluation
    return None if pending is None else pending.step


def begin_evaluation(run: Run) -> None:
    """Begins the evaluation of the policy as it is now; none is under way.

    Raises:
        Stopped: a stop was asked for while servers were waited for; the evaluation has not begun.
        NoServerError: see SGLangEngine.publish.
    """
    progress = run.progress
    pending = PendingEvaluation(step=progress.step, weight_version=progress.weight_version)
    _begin(run, pending)
    progress.pending_evaluation, progress.evaluated_step = pending, pending.step


def resume_evaluation(run: Run) -> None:
    """Goes on with the evaluation that was under way when the run's checkpoint was saved, if there was one.

    Without evaluation.servers, which may have changed since, training waits for it.

    Raises:
        Stopped, NoServerError: see `begin_evaluation`.
    """
    pending = run.progress.pending_evaluation
    if pending is None:
        return
    logger.info("the evaluation after %d steps was under way, and goes on", pending.step)
    if run.evaluation is not None:
        _begin(run, pending)
        return
    report = _journalled(run, pending)
    if report is None:
        if not _has_weights(run, pending):
            return
        report = _evaluated_again(run, pending)
    _note(run, report)


def end_evaluation(run: Run, *, wait: bool) -> None:
    """Writes the record of the evaluation that is under way, if its responses are complete, and notes its score.

    wait: waits until they are complete.

    Raises:
        Stopped: a stop was asked for; the next start goes on with the evaluation.
        TooManyUndecided: see Sampler.check_undecided; the evaluation stays under way.
        NoServerError, ValueError, OSError: see BackgroundSampling.
    """
    pending, sampling = run.progress.pending_evaluation, run.evaluation
    if pending is None or sampling is None:
        return
    before = sampling.waited_seconds
    with sampling.standstill():
        is_complete = _is_complete(run, pending, sampling, wait=wait)
    waited = sampling.waited_seconds - before
    if not is_complete or (not wait and run.store.is_busy):  # the best checkpoint is named once it is whole
        return
    if wait and waited > _LONG_SECONDS and run.progress.step < run.num_steps:
        logger.warning(
            "the evaluation after %d steps was under way when the next was due, and training waited %.1f s for it; "
            "raise evaluation.every or evaluation.servers",
            pending.step,
            waited,
        )
    with sampling.standstill(), run.timeline.recorded("evaluation"):
        metrics = benchmarks_metrics(run, pending.step, _results(run, sampling.results()))
    report = EvaluationReport(
        step=pending.step,
        metrics=metrics,
        seconds=sampling.seconds,
        ended_after=run.progress.step,
        waited_seconds=sampling.waited_seconds,
    )
    run.tracker.evaluation(report)
    sampling.close()
    run.store.finish(wait=True)
    _note(run, report)


def _note(run: Run, report: EvaluationReport) -> None:
    """Ends the evaluation that was under way, and names its checkpoint the best if its score is."""
    run.progress.pending_evaluation = None
    note_score(run, report)
    run.store.remember_best(run.progress.best)


def _journalled(run: Run, pending: PendingEvaluation) -> EvaluationReport | None:
    """Returns the evaluation, if the journal has all of its responses; logs it."""
    start = time.perf_counter()
    sampler, calls = run.sampler, _calls(run, pending, run.sampler)
    finished = [sampler.journalled(call) for call in calls]
    is_complete = all(len(units) == len(call.units) for call, units in zip(calls, finished, strict=True))
    if not run.groups.from_main(is_complete):
        return None
    groups = [sampler.complete_groups(call, units) for call, units in zip(calls, finished, strict=True)]
    metrics = benchmarks_metrics(run, pending.step, _results(run, groups))
    report = EvaluationReport(step=pending.step, metrics=metrics, seconds=time.perf_counter() - start)
    run.tracker.evaluation(report)
    return report


def _evaluated_again(run: Run, pending: PendingEvaluation) -> EvaluationReport:
    """Returns the evaluation of a step's weights, while training waits; the servers have the run's weights after it."""
    servers = run.config.rollout.sglang
    report = None
    with _weights_of(run, pending):
        run.engine.publish(pending.weight_version)
        if servers is None or not servers.shares_devices:
            report = evaluate_run(run, pending.step)
    if report is None:  # colocated servers hold the weights, and take the memory of the policy
        report = evaluate_run(run, pending.step)
    with run.policy.on_device():
        run.engine.publish(run.progress.weight_version)
    return report


def _begin(run: Run, pending: PendingEvaluation) -> None:
    """Sends the servers the weights of an evaluation, unless the journal has all responses, and has them generate."""
    sampling = run.evaluation
    assert sampling is not None
    if not sampling.begin(_calls(run, pending, sampling.sampler)) or not _has_weights(run, pending):
        return
    with sampling.standstill(), run.timeline.recorded("evaluation"):
        if sampling.engine.weight_version != pending.weight_version:
            with _weights_of(run, pending):
                sampling.publish(lambda: sampling.engine.publish(pending.weight_version))
        sampling.generate()


def _is_complete(run: Run, pending: PendingEvaluation, sampling: BackgroundSampling, *, wait: bool) -> bool:
    """Returns whether all responses are complete, on every rank; sends the weights again where no server has them.

    wait: returns once they are.
    """
    while True:
        states = sampling.wait(sampling.engine.heartbeat_seconds if wait else 0.0)
        if all(state.is_done for state in states):
            return True
        if wait and any(state.is_stopped for state in states):
            raise Stopped(f"stopped while the evaluation after {pending.step} steps was under way")
        if any(state.has_no_weights for state in states):
            if not _has_weights(run, pending):
                return False
            with _weights_of(run, pending):
                sampling.publish(lambda: sampling.engine.resend(wait=False))
        if not wait:
            return False
        run.groups.check_others()


def _calls(run: Run, pending: PendingEvaluation, sampler: Sampler) -> list[SampleCall]:
    """Returns the calls of every benchmark, in their order."""
    config = run.config
    return [
        sampler.call(
            benchmark.prompts,
            batch_name=evaluation_name(pending.step),
            num_samples=num_samples,
            sampling=sampling,
            seed_of=rollout_seeds(config.run.seed, "evaluation", 0),
            weight_version=pending.weight_version,
        )
        for benchmark in run.benchmarks
        for num_samples, sampling in asked_of(benchmark, config.evaluation.sampling)
    ]


def _results(run: Run, of_calls: Sequence[list[list[GradedRollout]]]) -> list[Results]:
    """Returns the responses of every benchmark, from the groups of every call."""
    groups = iter(of_calls)
    return [
        ([group[0] for group in next(groups)], next(groups) if benchmark.samples else [])
        for benchmark in run.benchmarks
    ]


def _has_weights(run: Run, pending: PendingEvaluation) -> bool:
    """Returns whether the weights of an evaluation are there; otherwise warns, and gives the evaluation up."""
    if run.progress.weight_version == pending.weight_version:
        return True
    run.store.finish(wait=True)
    name = pending.checkpoint
    found = run.store.damages(name) if run.store.has(name) else ["it is not there"]
    if not found:
        return True
    logger.warning(
        "the evaluation after %d steps is lost: not all of its responses are there, and checkpoint %s cannot be used "
        "for the others: %s",
        pending.step,
        name,
        "; ".join(found),
    )
    if run.evaluation is not None:
        run.evaluation.close()
    run.progress.pending_evaluation = None
    return False


@contextlib.contextmanager
def _weights_of(run: Run, pending: PendingEvaluation) -> Iterator[None]:
    """Context in which the policy, on the device, has the weights of an evaluation."""
    with run.policy.on_device():
        if run.progress.weight_version == pending.weight_version:
            yield
            return
        with weights_of_checkpoint(
            "policy", run.policy.module, lambda state: run.store.load(pending.checkpoint, state)
        ):
            yield
