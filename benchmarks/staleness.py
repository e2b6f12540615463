"""Schedules of rollouts compared by what they learn: the arithmetic demo with an SGLang server, from the same starts.

    python -m benchmarks.staleness [--steps 50] [--seeds 0 1 2] [--arms in_turn one_ahead ...] [OVERRIDE ...]

Prints a Markdown table of greedy pass@1 on the held-out problems after equal numbers of updates, with the difference
from `in_turn` of the same seed, and the measured age of the trained tokens. Finished runs are read, not run again: the
command goes on where it was stopped.

How old tokens are depends on which is faster, the server or the trainer. In the arms "at the bound" every publication
waits until all responses that the bound admits are there, so that all tokens, from that many updates on, are as old as
`rollout.max_staleness` allows.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.objectives import begin_from, run, score_of, train
from oreal_megatron.metrics import read_metrics
from oreal_megatron.rollout.ahead import RolloutsAhead

IN_TURN = "in_turn"
AT_THE_BOUND = "at the bound"
UNCORRECTED, CORRECTED = "objective.importance_limit=null", "objective.importance_limit=2.0"
SCHEDULES: dict[str, tuple[str, ...]] = {
    "one_ahead": ("rollout.schedule=one_ahead", "rollout.max_staleness=1"),
    "continuous 4": ("rollout.schedule=continuous", "rollout.max_staleness=4"),
    "continuous 4, keep_cache": (
        "rollout.schedule=continuous", "rollout.max_staleness=4", "rollout.in_flight=keep_cache",
    ),
    f"continuous 4, {AT_THE_BOUND}": ("rollout.schedule=continuous", "rollout.max_staleness=4"),
    f"continuous 16, {AT_THE_BOUND}": ("rollout.schedule=continuous", "rollout.max_staleness=16"),
}  # fmt: skip
ARMS: dict[str, tuple[str, ...]] = {IN_TURN: ("rollout.schedule=in_turn", UNCORRECTED)}
"""Arms: overrides of experiment=arithmetic_sglang. The number is rollout.max_staleness."""
for _name, _overrides in SCHEDULES.items():
    ARMS[_name] = (*_overrides, UNCORRECTED)
    ARMS[f"{_name}, corrected"] = (*_overrides, CORRECTED)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Measures of a run."""

    score: float
    """Greedy pass@1 at the end, in percent."""
    mean_age: float
    """Of the trained tokens, in updates: the mean over the steps that trained the policy."""
    oldest: float
    effective_samples: float | None
    """Of the older tokens, as a share: the lowest of a step."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--arms", nargs="+", choices=list(ARMS), default=list(ARMS), metavar="ARM", help="; ".join(ARMS)
    )
    parser.add_argument("--directory", type=Path, default=Path("runs/staleness"))
    parser.add_argument("overrides", nargs="*", help="further overrides of the experiment, for all runs alike")
    arguments = parser.parse_args()
    shared = [f"run.num_steps={arguments.steps}", "run.checkpoint_every=0", "evaluation.every=0", *arguments.overrides]
    found: dict[str, list[Outcome]] = {arm: [] for arm in arguments.arms}
    before = []
    for seed in arguments.seeds:
        start = arguments.directory / f"start_{seed}"
        run("oreal", seed, start, [*shared, "run.num_steps=0"])
        before.append(100 * score_of(start)[0])
        for arm in arguments.arms:
            place = arguments.directory / f"{arm.replace(', ', '_').replace(' ', '_')}_{seed}"
            begin_from(start, place)
            how = train_at_the_bound if AT_THE_BOUND in arm else train
            run("oreal", seed, place, [*shared, *ARMS[arm]], experiment="arithmetic_sglang", train=how)
            found[arm].append(outcome_of(place))
            print(f"seed {seed}  {arm:36} {found[arm][-1]}", flush=True)
    print(f"before: {', '.join(f'{score:.1f}' for score in before)}\n")
    print(table(found))


def train_at_the_bound(arguments: list[str]) -> None:
    """`oreal-train` whose publications wait until the servers have finished everything that the bound admits."""

    def settle(self: RolloutsAhead) -> None:
        self._wait(lambda: all(batch.is_served for batch in self._batches))

    RolloutsAhead.settle = settle  # type: ignore[method-assign]
    train(arguments)


def outcome_of(directory: Path) -> Outcome:
    steps, _ = read_metrics(directory)
    trained = [step["metrics"] for step in steps if "policy/older_effective_samples" in step["metrics"]]
    return Outcome(
        score=100 * score_of(directory)[1],
        mean_age=statistics.mean([m["rollout/mean_updates"] for m in trained] or [0.0]),
        oldest=max((m["rollout/oldest_updates"] for m in trained), default=0.0),
        effective_samples=min((m["policy/older_effective_samples"] for m in trained), default=None),
    )


def table(found: Mapping[str, Sequence[Outcome]]) -> str:
    lines = [
        "| arm | greedy pass@1 by seed | mean | minus in_turn: mean (min to max) | mean age | oldest "
        "| effective samples |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm, outcomes in found.items():
        scores = [outcome.score for outcome in outcomes]
        difference = ""
        if arm != IN_TURN and IN_TURN in found:
            gains = [score - turn.score for score, turn in zip(scores, found[IN_TURN], strict=True)]
            difference = f"{statistics.mean(gains):+.1f} ({min(gains):+.1f} to {max(gains):+.1f})"
        shares = [outcome.effective_samples for outcome in outcomes if outcome.effective_samples is not None]
        lines.append(
            f"| {arm} | {', '.join(f'{score:.1f}' for score in scores)} "
            f"| {statistics.mean(scores):.1f} | {difference} | "
            f"{statistics.mean(outcome.mean_age for outcome in outcomes):.1f} | "
            f"{max(outcome.oldest for outcome in outcomes):.0f} | {f'{min(shares):.3f}' if shares else ''} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
