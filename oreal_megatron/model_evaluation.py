"""Evaluation of a model by itself: every benchmark generated, graded, scored and written."""

from __future__ import annotations

import logging
from typing import Any

from oreal_megatron.config import TrainConfig
from oreal_megatron.evaluation import evaluate_benchmark, generator, own_metrics, scores_on_every_rank
from oreal_megatron.evaluation_report import (
    benchmark_results,
    response_records,
    score_rows,
    write_responses,
    write_results,
)
from oreal_megatron.rollout.sampler import Sampler
from oreal_megatron.scores import all_responses, benchmark_metrics
from oreal_megatron.types import undecided
from oreal_megatron.workspace import Workspace

logger = logging.getLogger(__name__)


def evaluate_model(workspace: Workspace, sampler: Sampler, *, weights: str) -> dict[str, Any]:
    """Evaluates the sampler's policy on every benchmark, and writes the results into the workspace's directory.

    weights: digest of the model's weights. Returns the content of evaluation.json; empty on ranks but the main rank.

    Raises:
        Stopped: a stop was asked for; finished responses are in the journal, and the same call continues.
        TooManyUndecided: the verifier decides too few responses, by rollout.undecided.stop.
        OSError: the disk refused.
    """
    config, groups, directory = workspace.config, workspace.groups, workspace.directory
    benchmarks: dict[str, Any] = {}
    records: list[dict[str, Any]] = []
    for benchmark in workspace.benchmarks:
        # With the weights in its name, a batch of other weights in the same directory is not taken for theirs.
        batch_name = f"{benchmark.name}_{weights}"
        generate = generator(
            sampler, batch_name, config.run.seed, title=benchmark.name, progress=workspace.tracker.progress
        )
        greedy, sampled = evaluate_benchmark(benchmark, generate, config.evaluation.sampling)
        responses = all_responses(greedy, sampled)
        sampler.check_undecided(benchmark.name, undecided(responses), len(responses), [batch_name])
        # pass@k for k = 2, 4, 8, ..., and for all samples.
        ks = sorted({benchmark.samples, *(2**power for power in range(1, benchmark.samples.bit_length()))})
        scores = scores_on_every_rank(greedy, sampled, workspace.verifier.are_equal, ks=ks, groups=groups)
        known = benchmark_metrics(greedy, sampled, scores)
        own = own_metrics(config.evaluation, greedy, sampled, known=known, groups=groups)
        with groups.together():
            if groups.is_main:
                write_responses(directory, benchmark.name, greedy, sampled)
                benchmarks[benchmark.name] = benchmark_results(benchmark, greedy, sampled, scores)
                benchmarks[benchmark.name]["metrics"] |= own
                records += response_records(benchmark.name, greedy, sampled)
                for _, _, score, value, interval in score_rows({benchmark.name: benchmarks[benchmark.name]}):
                    logger.info("%s: %s %s (%s)", benchmark.name, score, value, interval)
    results: dict[str, Any] = {}
    with groups.together():
        if groups.is_main:
            results = write_results(directory, evaluated(config, weights), benchmarks, records)
    return results


def evaluated(config: TrainConfig, weights: str) -> dict[str, Any]:
    """Returns what is evaluated, and the settings that its responses depend on, for evaluation.json."""
    return {
        "model": config.model.path,
        "weights": weights,
        "seed": config.run.seed,
        "dtype": config.served_dtype,
        "backend": config.rollout.backend,
        "max_sequence_length": config.model.max_sequence_length,
        "sampling": config.evaluation.sampling.model_dump(mode="json"),
        "prompt": config.prompt.model_dump(mode="json"),
        "verifier": config.verifier.model_dump(mode="json", exclude={"num_workers", "cache_path"}),
        "generation": None if config.rollout.generation is None else config.rollout.generation.model_dump(mode="json"),
        "reward": None if config.rollout.reward is None else config.rollout.reward.model_dump(mode="json"),
    }
