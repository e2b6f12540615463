"""Every objective from the same warm start with the same number of rollouts; a Markdown table of held-out pass@1.

    python -m benchmarks.objectives [--steps 30] [--seeds 0 1 2] [--directory runs/objectives] [OVERRIDE ...]
    python -m benchmarks.objectives --directory runs/unfrozen objective.actor_freeze_steps=0 # equal updates

Runs that are finished are read, not run again: the command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

from oreal_megatron.metrics import read_metrics

OBJECTIVES = (
    "oreal", "oreal_change", "oreal_paper", "oreal_release", "oreal_no_rm", "oreal_release_no_rm",
    "grpo", "rloo", "reinforce", "raft", "reinforce_rej", "psr", "nsr",
    "dapo", "dr_grpo", "gspo", "cispo", "reinforce_pp", "grpo_epochs",
)  # fmt: skip
# A process that has imported everything, to fork the runs from.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["oreal_megatron.builder", "oreal_megatron.report"])
SCORE = "heldout/greedy_pass@1"
COMMON = (
    "tracking.console=quiet", "tracking.wandb=disabled", "tracking.tensorboard=false", "tracking.report=false",
    "run.export=none",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=OBJECTIVES, metavar="PRESET")
    parser.add_argument("--directory", type=Path, default=Path("runs/objectives"))
    parser.add_argument("overrides", nargs="*", help="further overrides of experiment=arithmetic, for all runs alike")
    arguments = parser.parse_args()
    shared = [f"run.num_steps={arguments.steps}", "run.checkpoint_every=0", "evaluation.every=0", *arguments.overrides]
    scores: dict[str, list[tuple[float, float, float | None]]] = {preset: [] for preset in arguments.objectives}
    for seed in arguments.seeds:
        start = arguments.directory / f"start_{seed}"
        run("oreal", seed, start, [*shared, "run.num_steps=0"])
        for objective in arguments.objectives:
            directory = arguments.directory / f"{objective}_{seed}"
            begin_from(start, directory)
            run(objective, seed, directory, shared)
            scores[objective].append(score_of(directory))
            print(
                f"seed {seed}  {objective:14} {scores[objective][-1][0]:.3f} -> {scores[objective][-1][1]:.3f}",
                flush=True,
            )
    print(table(scores, arguments.steps))


def train(arguments: list[str]) -> None:
    """`oreal-train`, in a forked process."""
    from oreal_megatron.cli import train as cli

    sys.argv = ["oreal-train", *arguments]
    cli.main()


def run(
    objective: str,
    seed: int,
    directory: Path,
    overrides: list[str],
    *,
    experiment: str = "arithmetic",
    train: Callable[[list[str]], None] = train,
) -> None:
    """Trains in a forked process, unless the run is finished. train: calls `oreal-train` with the arguments."""
    arguments = [f"experiment={experiment}", f"objective={objective}", f"run.seed={seed}", f"run.dir={directory}"]
    if not (directory / "checkpoints" / "best.json").is_file() or not done(directory, overrides):
        process = FORKS.Process(target=train, args=([*arguments, "run.name=objectives", *COMMON, *overrides],))
        process.start()
        process.join()
        if process.exitcode:
            sys.exit(f"{objective}, seed {seed}: exit status {process.exitcode}")


def done(directory: Path, overrides: list[str]) -> bool:
    steps = int(next(o for o in reversed(overrides) if o.startswith("run.num_steps=")).partition("=")[2])
    return any(record["step"] == steps for record in read_metrics(directory)[1])


def begin_from(start: Path, directory: Path) -> None:
    """The warm start and the pass rates of `start`, so that all objectives begin alike."""
    if not directory.exists():
        shutil.copytree(start / "checkpoints" / "initial", directory / "checkpoints" / "initial")
        shutil.copy(start / "pass_rates.jsonl", directory)


def score_of(directory: Path) -> tuple[float, float, float | None]:
    """(pass@1 before, after, AUC of the reward model within prompts after)."""
    evaluations = read_metrics(directory)[1]
    first, last = evaluations[0]["metrics"], evaluations[-1]["metrics"]
    return first[SCORE], last[SCORE], last.get("heldout/reward_model_auc_within_prompts")


def table(scores: dict[str, list[tuple[float, float, float | None]]], steps: int) -> str:
    lines = [
        f"| objective | before | after {steps} steps, mean | spread (min to max) | AUC within prompts, mean |",
        "|---|---|---|---|---|",
    ]
    for objective, found in sorted(scores.items(), key=lambda item: -statistics.mean(s[1] for s in item[1])):
        after = [100 * score for _, score, _ in found]
        aucs = [auc for _, _, auc in found if auc is not None]
        lines.append(
            f"| `{objective}` | {100 * statistics.mean(s[0] for s in found):.1f} | {statistics.mean(after):.1f} | "
            f"{min(after):.1f} to {max(after):.1f} | {f'{statistics.mean(aucs):.2f}' if aucs else ''} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
