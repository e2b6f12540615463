"""Host work of a step behind its last response, on synthetic responses: seconds and memory by phase, against limits.

    torchrun --standalone --nproc-per-node 2 -m benchmarks.host_step [--prompts 64] [--samples 16] [--tokens 8000]

Everything runs as in a step but the models: the journal, the exchange of responses between ranks, selection, packing,
token weights, metrics and trajectories; then a resume from the journal, and the report. Every rank is a replica of its
own. The second of two steps is reported. The peer writes and reads the same tokens and log-probabilities as one file of
numpy.

A rank's seconds are those in which it works: wall seconds on the main rank, and CPU seconds of the calling thread on
the others, which wait for the main rank. Memory is that of the process; the limit is for what is left without the
micro-batches, which are on the device in a run with GPUs.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import yaml

from benchmarks.pairs import seconds
from oreal_megatron.compose import composed, validated
from oreal_megatron.config import ParallelConfig, SamplingConfig
from oreal_megatron.data.packing import Packer, Padding, SequenceCost, TokenBatch
from oreal_megatron.data.prompting import PromptRenderer
from oreal_megatron.data.tokenizer import load_tokenizer
from oreal_megatron.distributed.cpu_backend import cpu_backend, peak_memory, reset_peak_memory
from oreal_megatron.distributed.environment import devices_hidden
from oreal_megatron.distributed.groups import ParallelGroups, parallel_groups
from oreal_megatron.losses.advantages import select_trajectories
from oreal_megatron.metrics import Tracker, rollout_metrics
from oreal_megatron.report import write_report
from oreal_megatron.rollout.engine import units_by_prompt
from oreal_megatron.rollout.journal import RolloutJournal
from oreal_megatron.rollout.sampler import Sampler, rollout_seeds
from oreal_megatron.run_state import RunProgress
from oreal_megatron.step import ScoredSequences, rollout_mismatch, with_token_weights
from oreal_megatron.stopping import StopRequest
from oreal_megatron.train import packed, save_trajectories
from oreal_megatron.types import (
    Completion,
    FinishReason,
    GenerationRequest,
    Grade,
    GradeRequest,
    Prompt,
    StepReport,
    Verdict,
    WeightSpan,
)

LIMIT_MAIN, LIMIT_OTHERS, LIMIT_MIB = 3.0, 0.3, 300.0
BEHIND = ("journal", "resume", "write", "report")
"""Phases that no step waits for: servers generate meanwhile, or a run starts or is over."""
ON_DEVICE = ("token weights", "mismatch")
"""Phases that compute on the device: on a GPU they are no work of the host."""


class SyntheticEngine:
    """A RolloutEngine that has its responses already: a unit a prompt."""

    weight_version = 0

    def __init__(self, num_tokens: int, vocabulary: int, at_the_end: Callable[[], None]):
        """at_the_end: called after the last response has been journalled."""
        self._at_the_end = at_the_end
        rng = np.random.default_rng(0)
        self._tokens = rng.integers(4, vocabulary, num_tokens).astype(np.int32)
        self._logprobs = -rng.exponential(0.3, num_tokens).astype(np.float32)

    def units(self, requests: Sequence[GenerationRequest]) -> list[list[int]]:
        return units_by_prompt(requests)

    def generate(
        self,
        units: Sequence[Sequence[GenerationRequest]],
        sampling: SamplingConfig,
        is_enough: Callable[[], bool] | None = None,
    ) -> Iterator[tuple[int, list[Completion]]]:
        length = len(self._tokens)
        spans = (WeightSpan(version=0, start=0, end=length),)
        for index, unit in enumerate(units):
            yield (
                index,
                [
                    Completion(
                        token_ids=tuple(np.roll(self._tokens, request.seed % length).tolist()),
                        logprobs=tuple(np.roll(self._logprobs, request.seed % length).tolist()),
                        finish_reason=FinishReason.LENGTH,
                        weight_spans=spans,
                    )
                    for request in unit
                ],
            )
        self._at_the_end()


def grade(requests: Sequence[GradeRequest]) -> list[Grade]:
    """Every second response is correct."""
    verdicts = (Verdict.CORRECT, Verdict.INCORRECT)
    return [Grade(verdict=verdicts[i % 2], reason="synthetic", stage="rules") for i in range(len(requests))]


class Phases:
    """Seconds of work, and peak memory above that of the beginning in MiB, by phase, on this rank."""

    def __init__(self, groups: ParallelGroups):
        self._groups = groups
        reset_peak_memory()
        self._before = peak_memory() or 0
        self.rows: list[tuple[str, float, float]] = []

    def __call__(self, name: str, work: Callable[[], Any]) -> Any:
        self._groups.barrier()
        self.begin(name)
        result = work()
        self.end()
        return result

    def begin(self, name: str) -> None:
        reset_peak_memory()
        self._name, self._start = name, self._clock()

    def end(self) -> None:
        self.rows.append((self._name, self._clock() - self._start, ((peak_memory() or 0) - self._before) / 2**20))

    def next(self, name: str) -> None:
        """Ends the present phase within its work, and begins another one."""
        self.end()
        self.begin(name)

    def _clock(self) -> float:
        return time.perf_counter() if self._groups.is_main else time.thread_time()


def step(phases: Phases, directory: Path, groups: ParallelGroups, arguments: argparse.Namespace) -> float:
    """Runs a step in a directory of its own. Returns the MiB of its micro-batches, which a GPU would hold."""
    config = validated(composed(["experiment=arithmetic", "objective.selection=all", f"run.dir={directory}"]))
    tokenizer = load_tokenizer("arithmetic")
    renderer = PromptRenderer(tokenizer, config.prompt, vocab_size=len(tokenizer))
    packer = Packer(
        num_ranks=groups.data_size,
        rank=groups.data_rank,
        token_budget=2 * arguments.tokens,
        count_multiple=1,
        padding=Padding(),
        cost=SequenceCost(per_token=1.0, per_pair=0.0, per_response_token=0.0),
        device=torch.device("cpu"),
    )
    tracker = Tracker(config, directory, is_main=groups.is_main)
    run: Any = SimpleNamespace(
        config=config, groups=groups, packer=packer, renderer=renderer, tracker=tracker, progress=RunProgress()
    )
    numbers = range(arguments.prompts)
    prompts = [Prompt(id=f"p{i}", question=f"Compute {i} + {i}.", gold_answer=str(2 * i)) for i in numbers]
    engine: Any = SyntheticEngine(arguments.tokens, len(tokenizer), lambda: phases.next("exchange"))
    sampling = SamplingConfig(temperature=1.0, top_p=0.9, max_new_tokens=arguments.tokens)

    def sample() -> list[Any]:
        journal = RolloutJournal(directory / "journal", groups)
        sampler = Sampler(
            engine,
            renderer,
            grade,
            journal,
            groups,
            StopRequest(),
            max_sequence_length=arguments.tokens + 64,
            undecided=None,
        )
        try:
            return sampler.sample(
                prompts,
                batch_name="step_000000",
                num_samples=arguments.samples,
                sampling=sampling,
                seed_of=rollout_seeds(0, "train", 0),
            ).groups
        finally:
            journal.close()

    graded = phases("journal", sample)
    selection = phases(
        "select",
        lambda: select_trajectories(graded, config.objective, seed=0, step=0, global_rng=None),  # type: ignore[arg-type]
    )
    metrics = phases("metrics", lambda: rollout_metrics(graded, selection))
    _, batches = phases("pack", lambda: packed(run, selection.trajectories))
    scores = [torch.zeros_like(batch.rollout_logprobs) for batch in batches]
    scored = ScoredSequences(scores=scores, mean_scores=[], outcomes=[])
    batches = phases("token weights", lambda: with_token_weights(batches, scored, config.objective, groups))
    noise = [torch.full_like(batch.rollout_logprobs, 1e-3) for batch in batches]
    metrics |= phases("mismatch", lambda: rollout_mismatch(noise, groups))
    phases("trajectories", lambda: save_trajectories(run, graded, selection, batches))
    run.tracker.start(0, is_evaluated=False)
    report = StepReport(step=0, metrics=metrics, seconds={"total": 1.0})
    phases("metrics file", lambda: run.tracker.step(report))
    phases("write", run.tracker.finish_trajectories)
    engine.generate = lambda *unused: iter(())
    phases("resume", lambda: (sample(), None)[1])
    on_device = sum(mib_of(batch) for batch in batches)
    if groups.is_main:
        (directory / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    run.tracker.close()
    return on_device


def mib_of(batch: TokenBatch) -> float:
    """Returns the memory of a micro-batch's tensors in MiB."""
    return sum(value.nbytes for value in vars(batch).values() if isinstance(value, torch.Tensor)) / 2**20


def peer(directory: Path, num_tokens: int) -> tuple[float, float]:
    """Returns the seconds to write and sync the tokens and log-probabilities as one numpy file, and to read it."""
    record = np.zeros(num_tokens, dtype=[("token", np.int32), ("logprob", np.float32)])
    path = directory / "peer.npy"
    return seconds(lambda: np.save(path, record)), seconds(lambda: np.load(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=8000, help="of every response")
    arguments = parser.parse_args()
    layout = ParallelConfig(tensor=1, pipeline=1, micro_batch_tokens=1)
    with (
        tempfile.TemporaryDirectory() as name,
        devices_hidden(),
        cpu_backend(),
        parallel_groups(layout, seed=0) as groups,
    ):
        directory = Path(groups.from_main(name))
        phases = Phases(groups)
        for name in ("warm-up", "measured"):  # the second step finds memory that the process has already
            phases.rows.clear()
            on_device = step(phases, directory / name, groups, arguments)
        if groups.is_main:
            phases.begin("report")
            write_report(directory / "measured")
            phases.end()
        arrays = arguments.prompts * arguments.samples * arguments.tokens * 8 / 2**20
        ranks = groups.gather_over_world([(phases.rows, on_device)])
        if not groups.is_main:
            return
        written, read = peer(directory, int(arrays * 2**20 / 8))
    responses = arguments.prompts * arguments.samples
    print(f"{responses} responses of {arguments.tokens} tokens, {len(ranks)} rank(s)")
    print(f"arrays {arrays:.0f} MiB; numpy writes them in {written:.2f} s and reads them in {read:.2f} s\n")
    for rank, ((rows, on_device),) in enumerate(ranks):
        print(f"rank {rank:<17} seconds   peak MiB beyond the start and the arrays")
        for phase, spent, mib in rows:
            note = "no step waits for it" if phase in BEHIND else "on the device" if phase in ON_DEVICE else ""
            print(f"  {phase:20} {spent:9.2f}   {mib - arrays:8.0f}   {note}".rstrip())
        critical = [row for row in rows if row[0] not in (*BEHIND, *ON_DEVICE)]
        total, limit = sum(row[1] for row in critical), LIMIT_OTHERS if rank else LIMIT_MAIN
        most = max(row[2] for row in critical) - arrays
        print(f"  a step waits         {total:9.2f}   (limit {limit})")
        print(f"  most memory                      {most:8.0f}")
        print(f"  without micro-batches            {most - on_device:8.0f}   (limit {LIMIT_MIB:.0f})\n")


if __name__ == "__main__":
    main()
