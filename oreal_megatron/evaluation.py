"""Evaluation of a run on benchmarks: pass@1, avg@k, pass@k, and the reward model's areas under the curve."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import numpy as np

from oreal_megatron.config import SamplingConfig
from oreal_megatron.data.packing import PackedSequence
from oreal_megatron.rollout.sampler import rollout_seeds
from oreal_megatron.run_state import Run
from oreal_megatron.step import score_sequences
from oreal_megatron.trajectories import to_records
from oreal_megatron.types import Benchmark, EvaluationReport, FinishReason, GradedRollout, Prompt, decided, undecided

Generate = Callable[[Sequence[Prompt], int, SamplingConfig], list[list[GradedRollout]]]
"""(prompts, samples per prompt, sampling) -> a group of graded rollouts per prompt."""


def evaluate_run(run: Run) -> EvaluationReport:
    """Evaluates the policy on every benchmark, and the reward model on the policy's samples; logs and returns both."""
    start = time.perf_counter()
    step = run.progress.step
    metrics: dict[str, float] = {}
    with run.engine.generation_context(run.policy.on_device):
        results = [
            evaluate_benchmark(benchmark, _generator(run), run.config.evaluation.sampling)
            for benchmark in run.benchmarks
        ]
    for benchmark, (greedy, sampled) in zip(run.benchmarks, results, strict=True):
        responses = [*greedy, *(graded for group in sampled for graded in group)]
        run.sampler.check_undecided(
            f"evaluation on {benchmark.name}", undecided(responses), len(responses), [_batch_name(step)]
        )
        metrics |= benchmark_metrics(benchmark, greedy, sampled)
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
    report = EvaluationReport(step=step, metrics=metrics, seconds=time.perf_counter() - start)
    run.tracker.evaluation(report)
    return report


def evaluate_benchmark(
    benchmark: Benchmark, generate: Generate, sampling: SamplingConfig
) -> tuple[list[GradedRollout], list[list[GradedRollout]]]:
    """Returns a greedy response per prompt, and `benchmark.samples` by `sampling`; both share its token limit."""
    greedy_sampling = sampling.model_copy(update={"temperature": 0.0, "top_p": 1.0})
    greedy = generate(benchmark.prompts, 1, greedy_sampling)
    sampled = generate(benchmark.prompts, benchmark.samples, sampling) if benchmark.samples else []
    return [group[0] for group in greedy], sampled


def benchmark_metrics(
    benchmark: Benchmark, greedy: Sequence[GradedRollout], sampled: Sequence[Sequence[GradedRollout]]
) -> dict[str, float]:
    """Returns `benchmark/name` -> value. An UNDECIDED response scores 0, as an incorrect one does."""
    k = benchmark.samples
    responses = [*greedy, *(graded for group in sampled for graded in group)]
    values = {
        "problems": float(len(greedy)),
        "undecided": float(len(greedy) - len(decided(greedy))),
        "undecided_share": 1.0 - len(decided(responses)) / max(len(responses), 1),
        "greedy_pass@1": _mean([float(graded.is_correct) for graded in greedy]),
        "response_tokens": _mean([float(graded.rollout.num_response_tokens) for graded in greedy]),
        "stopped": _mean([float(g.rollout.finish_reason is FinishReason.STOP) for g in greedy]),
    }
    if k:
        outcomes = [[float(graded.is_correct) for graded in group] for group in sampled]
        values[f"avg@{k}"] = _mean([value for group in outcomes for value in group])
        if k > 1:
            values[f"pass@{k}"] = _mean([max(group) for group in outcomes])
    return {f"{benchmark.name}/{name}": value for name, value in values.items()}


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
    by_prompt: dict[str, list[int]] = {}
    for index, id in enumerate(prompt_ids):
        by_prompt.setdefault(id, []).append(index)
    below = num_pairs = 0.0
    for indices in by_prompt.values():
        own = [outcomes[index] for index in indices]
        pairs = sum(own) * (len(own) - sum(own))
        if pairs:
            num_pairs += pairs
            below += pairs * area_under_curve([scores[index] for index in indices], own)
    return {
        "auc": area_under_curve(scores, outcomes),
        "auc_within_prompts": below / num_pairs if num_pairs else math.nan,
    }


def _batch_name(step: int) -> str:
    return f"evaluation_{step:06d}"


def _generator(run: Run) -> Generate:
    """Samples with the run's sampler, with the same seeds at every evaluation."""

    def generate(prompts: Sequence[Prompt], num_samples: int, sampling: SamplingConfig) -> list[list[GradedRollout]]:
        return run.sampler.sample(
            prompts,
            batch_name=_batch_name(run.progress.step),
            num_samples=num_samples,
            sampling=sampling,
            seed_of=rollout_seeds(run.config.run.seed, "evaluation", 0),
        ).groups

    return generate


def _reward_model_scores(run: Run, groups: Sequence[Sequence[GradedRollout]]) -> dict[str, float]:
    """Outcome logits of the decided rollouts, by rollout id, on every rank; empty without a reward model."""
    if run.reward_model is None:
        return {}
    sequences = [PackedSequence.from_graded(graded) for group in groups for graded in decided(group)]
    batches = run.packer.batches_from_main(sequences, run.groups)
    alignment = run.config.objective.token_weights.alignment
    with run.reward_model.on_device():
        scored = score_sequences(run.reward_model.module, batches, alignment, run.groups)
    ids = [id for batch in batches for id in batch.ids]
    pairs = run.groups.gather_over_data(list(zip(ids, scored.mean_scores, strict=True)))
    return dict(pair for part in pairs for pair in part)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
