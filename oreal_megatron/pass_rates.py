"""The difficulty of the training prompts, estimated with the initial policy before the first step."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

from oreal_megatron.config import TrainConfig
from oreal_megatron.data.prompts import read_estimated, write_estimated
from oreal_megatron.distributed.groups import ParallelGroups
from oreal_megatron.metrics import Tracker
from oreal_megatron.rollout.journal import RolloutJournal
from oreal_megatron.rollout.sampler import Sampler, rollout_seeds
from oreal_megatron.seeds import derive_seed
from oreal_megatron.types import Prompt


def with_pass_rates(
    prompts: list[Prompt],
    config: TrainConfig,
    sampler: Sampler,
    *,
    directory: Path,
    groups: ParallelGroups,
    tracker: Tracker,
    journal: RolloutJournal,
) -> list[Prompt]:
    """Prompts with the share of the initial policy's responses that are correct; kept in directory/pass_rates.jsonl.

    Raises:
        Stopped: a stop was asked for; what was estimated is in the journal.
        ValueError: pass_rates.jsonl is of other data.
    """
    estimation = config.data.pass_rate
    assert estimation is not None
    path = directory / "pass_rates.jsonl"
    if groups.from_main(path.is_file()):
        return read_estimated(path, source=prompts)
    known = [prompt for prompt in prompts if prompt.pass_rate is not None]
    unknown = [prompt for prompt in prompts if prompt.pass_rate is None]
    if estimation.max_prompts is not None and len(unknown) > estimation.max_prompts:
        unknown = random.Random(derive_seed(config.run.seed, "estimate")).sample(unknown, estimation.max_prompts)
    estimated: list[Prompt] = []
    size = max(config.rollout.batch_size // estimation.samples, 1) * groups.data_size
    with tracker.progress("pass rates", len(unknown)) as bar:
        for start in range(0, len(unknown), size):
            part = unknown[start : start + size]
            estimated += _estimated(part, config, sampler, estimation.samples, f"pass_rates_{start // size:06d}")
            correct = sum(prompt.pass_rate or 0.0 for prompt in estimated) / max(len(estimated), 1)
            bar.advance(f"mean {correct:.2f}", by=len(part))
    if groups.is_main:
        write_estimated(path, known + estimated, source=prompts)
    groups.barrier()
    journal.forget("pass_rates_*")
    return known + estimated


def _estimated(
    prompts: list[Prompt], config: TrainConfig, sampler: Sampler, num_samples: int, batch_name: str
) -> list[Prompt]:
    """Prompts with a decided response, with their pass rate."""
    graded_groups = sampler.sample(
        prompts,
        batch_name=batch_name,
        num_samples=num_samples,
        sampling=config.rollout.sampling,
        seed_of=rollout_seeds(config.run.seed, "pass_rate", 0),
    ).groups
    estimated = []
    for prompt, group in zip(prompts, graded_groups, strict=True):
        decided = [graded.verdict == "CORRECT" for graded in group if graded.verdict != "UNDECIDED"]
        if decided:
            estimated.append(replace(prompt, pass_rate=sum(decided) / len(decided)))
    return estimated
