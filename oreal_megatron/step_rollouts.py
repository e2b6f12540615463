"""The rollouts of a step: generated now, generated ahead of it, or those of another run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from oreal_megatron.checkpoint.store import step_name
from oreal_megatron.config import TrainConfig
from oreal_megatron.distributed.step_timer import StepTimer
from oreal_megatron.losses.advantages import is_useful
from oreal_megatron.rollout.ahead import RolloutsAhead
from oreal_megatron.rollout.early_stop import EarlyStop
from oreal_megatron.rollout.response_limits import limits_of_step
from oreal_megatron.rollout.sampler import SampleResult, on_every_rank, rollout_seeds
from oreal_megatron.run_state import Run
from oreal_megatron.stopping import Stopped, TooManyUndecided
from oreal_megatron.trajectories import read_groups
from oreal_megatron.types import GradedRollout, undecided


def rolled_out(run: Run, clock: StepTimer) -> SampleResult:
    """Returns graded responses to the step's prompts; rollouts in the journal are read from there."""
    name, position = step_name(run.progress.step), run.stream.state_dict()
    try:
        with run.engine.generation_context(run.policy.on_device):
            sampled = generated_now(run, clock) if run.ahead is None else generated_ahead(run, run.ahead, clock)
        responses = [graded for group in sampled.groups for graded in group]
        # What makes a step's responses UNDECIDED has made those of the later steps UNDECIDED too.
        names = [name] if run.ahead is None else run.ahead.batch_names
        run.sampler.check_undecided(name.replace("_", " "), undecided(responses), len(responses), names)
    except (Stopped, TooManyUndecided):
        # Nothing was trained on these prompts. The checkpoint that follows has the stream draw them again.
        if run.ahead is None:
            run.stream.load_state_dict(position)
        raise
    run.stream.put_back(sampled.unfinished)
    run.stream.observe(sampled.groups)
    return sampled


def generated_now(run: Run, clock: StepTimer) -> SampleResult:
    """Draws the step's prompts and generates its rollouts."""
    config, step = run.config, run.progress.step
    return run.sampler.sample(
        run.stream.draw(),
        batch_name=step_name(step),
        num_samples=config.rollout.samples_per_prompt,
        sampling=config.rollout.sampling,
        seed_of=rollout_seeds(config.run.seed, "train", step),
        limits_of=limits_of_step(config.rollout.sampling, step),
        clock=clock,
        early_stop=early_stop_of(config, step),
    )


def generated_ahead(run: Run, ahead: RolloutsAhead, clock: StepTimer) -> SampleResult:
    """Waits for the step's rollouts, while servers generate those of later steps too."""
    with clock("generate"):
        return ahead.take(run.progress.step, run.stream.draw)


def early_stop_of(config: TrainConfig, step: int) -> EarlyStop | None:
    """Returns when the step's sampling ends early under rollout.long_tail; None without it."""
    tail = config.rollout.long_tail
    if tail is None:
        return None
    return EarlyStop(
        num_groups=config.data.prompts_per_step,
        counts=lambda group: tail.until == "complete" or is_useful(group, config.objective),
        max_staleness=tail.carry_updates,
        next_batch=step_name(step + 1),
    )


def replayed(run: Run) -> SampleResult:
    """Reads the graded rollouts of this step from run.replay_dir.

    Raises:
        ValueError: there is no file for the step, or a line of it is not a trajectory record. OSError on other ranks
            than the main rank, which reads the file.
    """
    assert run.config.run.replay_dir is not None
    path = Path(run.config.run.replay_dir) / f"{step_name(run.progress.step)}.jsonl"
    graded: list[list[GradedRollout]] = []
    with run.groups.together():
        if run.groups.is_main:
            if not path.is_file():
                raise ValueError(
                    f"run.replay_dir: there is no {path}; set run.num_steps to the number of steps that were saved"
                )
            graded = read_groups(path)
    return SampleResult(groups=on_every_rank(graded, run.groups), unfinished=[], metrics={})


def published(run: Run, clock: StepTimer) -> Mapping[str, float]:
    """Publishes the policy as the progress's weight version; servers generate ahead until the weights can be sent.

    Returns metrics for the step's report.
    """
    version = run.progress.weight_version
    with clock("publish"), run.policy.on_device():
        if run.ahead is None:
            return run.engine.publish(version)
        run.ahead.prepare(version)
    with clock("settle"):
        run.ahead.settle()
    with clock("publish"), run.policy.on_device():
        return run.ahead.publish(version)


def begin_ahead(run: Run, step: int) -> None:
    """Has the servers generate for `step`, the next to train, and later steps, where rollouts are generated ahead."""
    if run.ahead is not None:
        run.ahead.begin(step, run.stream.draw)


def pause_ahead(run: Run) -> None:
    """Ends generation and grading for later steps, so that an evaluation has servers and verifier for itself."""
    if run.ahead is not None:
        run.ahead.pause()


def keep_ahead(run: Run) -> None:
    """Ends generation for later steps, and keeps what there is of their responses for the next start."""
    if run.ahead is not None:
        run.ahead.keep()
