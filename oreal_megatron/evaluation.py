"""Evaluation on benchmarks: responses, their scores, and the areas under the curve of a run's reward model."""

from __future__ import annotations

import functools
import math
import numbers
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager

import numpy as np

from oreal_megatron.checkpoint.store import Best, is_better
from oreal_megatron.config import EvaluationConfig, SamplingConfig
from oreal_megatron.data.packing import PackedSequence
from oreal_megatron.distributed.groups import ParallelGroups
from oreal_megatron.extensions import metric_functions
from oreal_megatron.metrics import ProgressBar
from oreal_megatron.rollout.sampler import Sampler, rollout_seeds
from oreal_megatron.run_state import Run
from oreal_megatron.scores import AreEqual, all_responses, benchmark_metrics, problem_scores
from oreal_megatron.step import over_all_ranks, score_sequences
from oreal_megatron.supervised import heldout_metrics
from oreal_megatron.trajectories import to_records
from oreal_megatron.types import Benchmark, EvaluationReport, GradedRollout, Prompt, decided, positions_by, undecided

Generate = Callable[[Sequence[Prompt], int, SamplingConfig], list[list[GradedRollout]]]
"""(prompts, samples per prompt, sampling) -> a group of graded rollouts per prompt."""

Results = tuple[list[GradedRollout], list[list[GradedRollout]]]
"""A benchmark's greedy response per prompt, and its samples per prompt; no samples where it asks for none."""


def evaluate_run(run: Run, step: int) -> EvaluationReport:
    """Evaluates the policy on every benchmark, and the reward model on its samples; logs and returns the report.

    In supervised fine-tuning, also measures the loss of held-out records. step: number of steps that the policy's
    weights have been trained for.
    """
    start = time.perf_counter()
    generate = generator(run.sampler, evaluation_name(step), run.config.run.seed)
    with run.engine.generation_context(run.policy.on_device):
        results = [evaluate_benchmark(each, generate, run.config.evaluation.sampling) for each in run.benchmarks]
    metrics = benchmarks_metrics(run, step, results)
    # Servers on the same devices are offloaded by now.
    if run.config.sft is not None and run.config.sft.heldout is not None:
        assert run.sft is not None
        with run.policy.on_device():
            metrics |= heldout_metrics(run.policy.module, run.sft.heldout, run.packer, run.groups)
    report = EvaluationReport(step=step, metrics=metrics, seconds=time.perf_counter() - start)
    run.tracker.evaluation(report)
    return report


def evaluation_name(step: int) -> str:
    """Returns the name of an evaluation's batch in the journal."""
    return f"evaluation_{step:06d}"


def benchmarks_metrics(run: Run, step: int, results: Sequence[Results]) -> dict[str, float]:
    """Returns the metrics of every benchmark, `benchmark/name` -> value, and writes the responses to evaluations/.

    The reward model scores them as it is now. results: of every benchmark.

    Raises:
        TooManyUndecided: see Sampler.check_undecided.
    """
    metrics: dict[str, float] = {}
    for benchmark, (greedy, sampled) in zip(run.benchmarks, results, strict=True):
        responses = all_responses(greedy, sampled)
        names = [evaluation_name(step), *(run.ahead.batch_names if run.ahead is not None else ())]
        run.sampler.check_undecided(f"evaluation on {benchmark.name}", undecided(responses), len(responses), names)
        by_problem = scores_on_every_rank(
            greedy, sampled, run.verifier.are_equal, ks=[benchmark.samples], groups=run.groups
        )
        values = benchmark_metrics(greedy, sampled, by_problem)
        values |= own_metrics(run.config.evaluation, greedy, sampled, known=values, groups=run.groups)
        metrics |= {f"{benchmark.name}/{name}": value for name, value in values.items()}
        groups = sampled or [[graded] for graded in greedy]
        scores = _reward_model_scores(run, groups)
        if scores:
            scored = [graded for group in groups for graded in decided(group)]
            areas = areas_under_curve(
                [scores[graded.rollout.id] for graded in scored],
                [graded.is_correct for graded in scored],
                [graded.rollout.prompt.id for graded in scored],
            )
            metrics |= {f"{benchmark.name}/reward_model_{name}": value for name, value in areas.items()}
        run.tracker.trajectories(f"evaluations/{benchmark.name}_{step:06d}", to_records(groups, scores=scores))
    return metrics


def note_score(run: Run, report: EvaluationReport) -> None:
    """Makes an evaluation the best of the run if its score is higher than those before it."""
    score = score_of(report.metrics, run.benchmarks)
    if is_better(score, run.progress.best):
        run.progress.best = Best(step=report.step, score=score)


def score_of(metrics: Mapping[str, float], benchmarks: Sequence[Benchmark]) -> float:
    """Returns the score by which the best checkpoint is chosen: the higher, the better.

    It is the greedy pass@1 of the first benchmark; without benchmarks, minus the loss of the held-out records.
    """
    return metrics[f"{benchmarks[0].name}/greedy_pass@1"] if benchmarks else -metrics["sft/heldout_loss"]


def evaluate_benchmark(benchmark: Benchmark, generate: Generate, sampling: SamplingConfig) -> Results:
    """Returns a greedy response per prompt, and `benchmark.samples` by `sampling`; both share its token limit."""
    greedy, *sampled = [generate(benchmark.prompts, *asked) for asked in asked_of(benchmark, sampling)]
    return [group[0] for group in greedy], sampled[0] if sampled else []


def asked_of(benchmark: Benchmark, sampling: SamplingConfig) -> list[tuple[int, SamplingConfig]]:
    """Returns the samples per prompt, and their sampling, that a benchmark asks for: a greedy one, then its samples."""
    greedy = sampling.model_copy(update={"temperature": 0.0, "top_p": 1.0})
    return [(1, greedy), *([(benchmark.samples, sampling)] if benchmark.samples else [])]


def scores_on_every_rank(
    greedy: Sequence[GradedRollout],
    sampled: Sequence[Sequence[GradedRollout]],
    are_equal: AreEqual,
    *,
    ks: Sequence[int],
    groups: ParallelGroups,
) -> dict[str, list[float]]:
    """Returns the `problem_scores` of the main rank: answers are compared under a time limit, so ranks could differ."""
    scores: dict[str, list[float]] = {}
    with groups.together():
        if groups.is_main:
            scores = problem_scores(greedy, sampled, are_equal, ks=ks)
    return groups.from_main(scores)


def own_metrics(
    config: EvaluationConfig,
    greedy: Sequence[GradedRollout],
    sampled: Sequence[Sequence[GradedRollout]],
    *,
    known: Collection[str],
    groups: ParallelGroups,
) -> dict[str, float]:
    """Returns the metrics of evaluation.functions, which the main rank computes. known: names that are taken.

    Raises:
        ValueError: a function failed, returned something else than a number, or has the name of another metric.
            OSError on the ranks that do not compute them.
    """
    found: dict[str, float] = {}
    with groups.together():
        for name, function in metric_functions(config).items() if groups.is_main else ():
            value = function(greedy=list(greedy), sampled=[list(group) for group in sampled])
            what = f"evaluation.functions.{name} = {config.functions[name].path}"
            if name in known or name.startswith("reward_model_"):
                raise ValueError(f"{what}: there is a metric of this name. Give it another name")
            if not isinstance(value, numbers.Real):
                raise ValueError(f"{what} returned a {type(value).__name__}; return a number")
            found[name] = float(value)
    return groups.from_main(found)


def generator(
    sampler: Sampler,
    batch_name: str,
    run_seed: int,
    *,
    title: str = "",
    progress: Callable[[str, int, int], AbstractContextManager[ProgressBar]] | None = None,
) -> Generate:
    """Returns a function that samples with the same seeds at every evaluation.

    batch_name: names the journal's files. progress: (title, number of responses, number there already) -> progress bar,
    whose title begins with `title`.
    """

    def generate(prompts: Sequence[Prompt], num_samples: int, sampling: SamplingConfig) -> list[list[GradedRollout]]:
        kind = "greedy" if sampling.temperature == 0 else f"{num_samples} samples"
        shown = f"{title}, {kind} of {len(prompts)} problems"
        return sampler.sample(
            prompts,
            batch_name=batch_name,
            num_samples=num_samples,
            sampling=sampling,
            seed_of=rollout_seeds(run_seed, "evaluation", 0),
            progress=None if progress is None else functools.partial(progress, shown),
        ).groups

    return generate


def area_under_curve(scores: Sequence[float], outcomes: Sequence[bool]) -> float:
    """Probability that a correct response scores above an incorrect one, ties counting half; nan without both."""
    values, correct = np.asarray(scores, dtype=np.float64), np.asarray(outcomes, dtype=bool)
    positive, negative = values[correct], np.sort(values[~correct])
    if not len(positive) or not len(negative):
        return math.nan
    below = np.searchsorted(negative, positive, side="left")
    not_above = np.searchsorted(negative, positive, side="right")
    return float((below + not_above).mean() / (2 * len(negative)))


def areas_under_curve(scores: Sequence[float], outcomes: Sequence[bool], prompt_ids: Sequence[str]) -> dict[str, float]:
    """Returns `auc` over all pairs of a correct and an incorrect response, and `auc_within_prompts`; nan without pairs.

    `auc` also counts how well the scores tell easy from hard prompts. `auc_within_prompts` is over the pairs of one
    prompt: a scorer that reads the prompt alone has 0.5.
    """
    below = num_pairs = 0.0
    for indices in positions_by(prompt_ids):
        own = [outcomes[index] for index in indices]
        pairs = sum(own) * (len(own) - sum(own))
        if pairs:
            num_pairs += pairs
            below += pairs * area_under_curve([scores[index] for index in indices], own)
    return {
        "auc": area_under_curve(scores, outcomes),
        "auc_within_prompts": below / num_pairs if num_pairs else math.nan,
    }


def _reward_model_scores(run: Run, groups: Sequence[Sequence[GradedRollout]]) -> dict[str, float]:
    """Outcome logits of the decided rollouts, by rollout id, on every rank; empty without a reward model."""
    if run.reward_model is None:
        return {}
    sequences = [
        PackedSequence.from_rollout(graded.rollout, correct=graded.is_correct)
        for group in groups
        for graded in decided(group)
    ]
    batches = run.packer.batches_from_main(sequences, run.groups)
    alignment = run.config.objective.token_weights.alignment
    with run.reward_model.on_device():
        scored = score_sequences(run.reward_model.module, batches, alignment, run.groups)
    ids, scores, _ = over_all_ranks(scored, batches, run.groups)
    return dict(zip(ids, scores, strict=True))
