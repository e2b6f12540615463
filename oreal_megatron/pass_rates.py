"""Difficulty of the training prompts: pass rates of the initial policy, estimated before the first step."""

from __future__ import annotations

import logging
import random
from dataclasses import replace

from oreal_megatron.config import TrainConfig
from oreal_megatron.data.prompts import balanced, read_estimated, write_estimated
from oreal_megatron.data.stream import PromptStream
from oreal_megatron.rollout.sampler import Sampler, rollout_seeds
from oreal_megatron.run_state import Run, offload
from oreal_megatron.seeds import derive_seed
from oreal_megatron.types import GradedRollout, Prompt, decided, undecided

logger = logging.getLogger(__name__)
_UNITS = 16
"""Generation batches that are sampled together; fixed, so that the journal serves any number of replicas."""


def prepare(run: Run) -> None:
    """Sets the run's prompt stream: training prompts balanced by pass rate, estimated where data.pass_rate asks for it.

    A run without training prompts gets none. Pass rates are kept in pass_rates.jsonl of the run's directory; a resumed
    run reads them from there.

    Raises:
        Stopped: a stop was asked for; finished rollouts are in the journal.
        ValueError: pass_rates.jsonl is of other data, or too few prompts are left for a step.
    """
    config, prompts = run.config, list(run.train_prompts)
    offload(run)
    if not prompts or config.is_sft:  # no step draws prompts
        return
    if config.data.pass_rate is not None:
        with run.engine.generation_context(run.policy.on_device):
            prompts = _with_pass_rates(prompts, run)
        run.engine.offload()
    run.stream = PromptStream(
        balanced(prompts, config.data.difficulty_balance),
        prompts_per_step=config.num_asked_prompts,
        seed=config.run.seed,
    )


def _with_pass_rates(prompts: list[Prompt], run: Run) -> list[Prompt]:
    """Returns the prompts whose pass rate is known or could be estimated."""
    estimation, groups = run.config.data.pass_rate, run.groups
    assert estimation is not None
    path = run.directory / "pass_rates.jsonl"
    if groups.from_main(path.is_file()):
        run.sampler.journal.forget("pass_rates_*")  # left by a run that was killed after it wrote the file
        return read_estimated(path, source=prompts)
    known = [prompt for prompt in prompts if prompt.pass_rate is not None]
    unknown = [prompt for prompt in prompts if prompt.pass_rate is None]
    if estimation.max_prompts is not None and len(unknown) > estimation.max_prompts:
        unknown = random.Random(derive_seed(run.config.run.seed, "estimate")).sample(unknown, estimation.max_prompts)
    estimated: list[Prompt] = []
    lost: list[GradedRollout] = []
    batch_names = []
    size = max(run.config.rollout.batch_size // estimation.samples, 1) * _UNITS
    with run.tracker.progress("pass rates", len(unknown)) as bar:
        for start in range(0, len(unknown), size):
            part = unknown[start : start + size]
            batch_names.append(f"pass_rates_{start // size:06d}")
            sampled = _sampled(part, run.config, run.sampler, estimation.samples, batch_names[-1])
            estimated += _estimated(part, sampled)
            lost += [
                replace(one, rollout=one.rollout.without_tokens()) for group in sampled for one in undecided(group)
            ]
            correct = sum(prompt.pass_rate or 0.0 for prompt in estimated) / max(len(estimated), 1)
            bar.advance(f"mean {correct:.2f}", by=len(part))
    _check_decided(unknown, estimated, has_others=bool(known))
    run.sampler.check_undecided("pass rates", lost, len(unknown) * estimation.samples, batch_names)
    with groups.together():
        if groups.is_main:
            write_estimated(path, known + estimated, source=prompts)
    run.sampler.journal.forget("pass_rates_*")
    return known + estimated


def _check_decided(asked: list[Prompt], estimated: list[Prompt], *, has_others: bool) -> None:
    """Logs how many prompts have no pass rate, because the verifier decided none of their responses.

    Raises:
        ValueError: no prompt has a pass rate.
    """
    rated = {prompt.id for prompt in estimated}
    lost = [prompt for prompt in asked if prompt.id not in rated]
    if not lost:
        return
    message = (
        f"{len(lost)} of {len(asked)} prompts have no pass rate, because the verifier left all of their responses "
        f"UNDECIDED (first: {lost[0].id}, gold_answer {lost[0].gold_answer[:80]!r})"
    )
    if not rated and not has_others:
        raise ValueError(f"{message}. Give data.train gold answers without words; docs/verifier.md has their forms.")
    logger.warning("%s; they are left out", message)


def _sampled(
    prompts: list[Prompt], config: TrainConfig, sampler: Sampler, num_samples: int, batch_name: str
) -> list[list[GradedRollout]]:
    """Returns a group of graded responses of the initial policy per prompt."""
    return sampler.sample(
        prompts,
        batch_name=batch_name,
        num_samples=num_samples,
        sampling=config.rollout.sampling,
        seed_of=rollout_seeds(config.run.seed, "pass_rate", 0),
    ).groups


def _estimated(prompts: list[Prompt], groups: list[list[GradedRollout]]) -> list[Prompt]:
    """Returns the prompts that have a decided response, with the share of those that is correct."""
    estimated = []
    for prompt, group in zip(prompts, groups, strict=True):
        outcomes = [graded.is_correct for graded in decided(group)]
        if outcomes:
            estimated.append(replace(prompt, pass_rate=sum(outcomes) / len(outcomes)))
    return estimated
