"""Difficulty of prompts: pass rates of a run's initial policy before its first step, or of a model by itself."""

from __future__ import annotations

import functools
import logging
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

from oreal_megatron.config import TrainConfig
from oreal_megatron.data.curation.report import Report
from oreal_megatron.data.difficulty import BANDS, band_of
from oreal_megatron.data.prompts import balanced, prompt_of, prompt_records, read_estimated, write_estimated
from oreal_megatron.data.stream import PromptStream
from oreal_megatron.files import json_line, write_parts_atomically
from oreal_megatron.metrics import Tracker
from oreal_megatron.rollout.sampler import Sampler, rollout_seeds
from oreal_megatron.run_state import Run, offload
from oreal_megatron.seeds import derive_seed
from oreal_megatron.types import GradedRollout, Prompt, decided, undecided
from oreal_megatron.workspace import Workspace

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
    balance = functools.partial(balanced, bins=config.data.difficulty_balance)
    run.stream = PromptStream(
        balance(prompts),
        prompts_per_step=config.num_asked_prompts,
        seed=config.run.seed,
        weights=config.data.source_weights,
        rollout_weight=0.0 if config.data.curriculum is None else config.data.curriculum.rollout_weight,
        balance=balance,
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
    estimated, lost = _estimate(unknown, run.sampler, run.config, run.tracker, "pass_rates")
    _check_decided(lost, len(unknown), is_empty=not known and not estimated)
    with groups.together():
        if groups.is_main:
            write_estimated(path, known + list(estimated.values()), source=prompts)
    run.sampler.journal.forget("pass_rates_*")
    return known + list(estimated.values())


def rate_model(
    workspace: Workspace, sampler: Sampler, output: Path, *, weights: str, shard: tuple[int, int]
) -> Report | None:
    """Writes the records of data.train with the pass rates of the sampler's policy; returns a report of them.

    Records whose pass rate cannot be estimated are written without one. Responses stay in the workspace's journal, from
    which the same call continues. Ranks but the main rank get None.

    weights: digest of the model's weights. shard: (index from 1, number of shards); record i is of shard i mod number.

    Raises:
        Stopped: a stop was asked for; finished responses are in the journal.
        TooManyUndecided: the verifier decides too few responses, by rollout.undecided.stop.
        OSError: the disk refused.
    """
    config, groups = workspace.config, workspace.groups
    records = list(islice(prompt_records(str(config.data.train)), shard[0] - 1, None, shard[1]))
    ids = [prompt_of(record, where).id for where, record in records]
    fitting = {prompt.id: prompt for prompt in workspace.train_prompts}
    asked = [fitting[id] for id in ids if id in fitting]
    # With the weights in its name, a batch of other weights in the same directory is not taken for theirs.
    estimated, lost = _estimate(asked, sampler, config, workspace.tracker, f"pass_rates_{weights}")
    _check_decided(lost, len(asked), is_empty=False)
    report = Report()
    bands: Counter[str] = Counter(dict.fromkeys(BANDS, 0))
    report.tables["pass rate"] = bands

    def lines() -> Iterator[bytes]:
        for id, (where, record) in zip(ids, records, strict=True):
            without = {key: value for key, value in record.items() if key != "pass_rate"}
            if id in estimated:
                rate = estimated[id].pass_rate
                bands[band_of(rate)] += 1
                report.counts["written, with a pass rate"] += 1
                yield json_line({**without, "pass_rate": rate})
            else:
                reason = "UNDECIDED alone" if id in fitting else "left out of data.train"
                report.add(f"written, without a pass rate: {reason}", where, record["question"])
                yield json_line(without)

    with groups.together():
        if groups.is_main:
            write_parts_atomically(output, lines())
    return report if groups.is_main else None


def _estimate(
    prompts: Sequence[Prompt], sampler: Sampler, config: TrainConfig, tracker: Tracker, batch_name: str
) -> tuple[dict[str, Prompt], list[Prompt]]:
    """Returns the prompts with the share of their decided responses that is correct, by id, and those without any.

    batch_name: beginning of the names of the journal's batches.

    Raises:
        Stopped: a stop was asked for.
        TooManyUndecided: see rollout.undecided.stop.
    """
    estimation = config.data.pass_rate
    assert estimation is not None
    estimated: dict[str, Prompt] = {}
    undecided_ones: list[GradedRollout] = []
    batch_names = []
    size = max(config.rollout.batch_size // estimation.samples, 1) * _UNITS
    with tracker.progress("pass rates", len(prompts)) as bar:
        for start in range(0, len(prompts), size):
            part = prompts[start : start + size]
            batch_names.append(f"{batch_name}_{start // size:06d}")
            sampled = sampler.sample(
                part,
                batch_name=batch_names[-1],
                num_samples=estimation.samples,
                sampling=config.rollout.sampling,
                seed_of=rollout_seeds(config.run.seed, "pass_rate", 0),
            ).groups
            for prompt, group in zip(part, sampled, strict=True):
                if outcomes := [graded.is_correct for graded in decided(group)]:
                    lengths = [graded.rollout.num_response_tokens for graded in group]
                    estimated[prompt.id] = replace(
                        prompt,
                        pass_rate=sum(outcomes) / len(outcomes),
                        response_tokens=sum(lengths) / len(lengths),
                    )
            undecided_ones += [
                replace(one, rollout=one.rollout.without_tokens()) for group in sampled for one in undecided(group)
            ]
            correct = sum(prompt.pass_rate or 0.0 for prompt in estimated.values()) / max(len(estimated), 1)
            bar.advance(f"mean {correct:.2f}", by=len(part))
    sampler.check_undecided("pass rates", undecided_ones, len(prompts) * estimation.samples, batch_names)
    return estimated, [prompt for prompt in prompts if prompt.id not in estimated]


def _check_decided(lost: Sequence[Prompt], num_asked: int, *, is_empty: bool) -> None:
    """Logs how many prompts have no pass rate, because the verifier decided none of their responses.

    lost: those prompts, of `num_asked`. is_empty: whether no other prompts are left.

    Raises:
        ValueError: no other prompts are left.
    """
    if not lost:
        return
    message = (
        f"{len(lost)} of {num_asked} prompts have no pass rate, because the verifier left all of their responses "
        f"UNDECIDED (first: {lost[0].id}, gold_answer {lost[0].gold_answer[:80]!r})"
    )
    if is_empty:
        raise ValueError(f"{message}. Give data.train gold answers without words; docs/verifier.md has their forms.")
    logger.warning("%s; they are left out", message)
