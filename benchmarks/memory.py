"""The planner's memory against measured peaks: each rank's resident memory in each phase, above that after the imports.

    python -m benchmarks.memory [--layouts NAME ...]

Real updates of a policy, a reference and a reward model of 42M parameters each on packed rows of 2,048 tokens.
glibc is told to hand large blocks back at once, since what it keeps for later is nobody's memory.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from oreal_megatron.composition import composed, resolved
from oreal_megatron.config import TrainConfig, parse_config

ROW = 2048
MODEL = (
    "model.geometry.num_layers=8 model.geometry.hidden_size=512 model.geometry.ffn_hidden_size=1536 "
    "model.geometry.num_attention_heads=8 model.geometry.num_query_groups=4 model.geometry.vocab_size=16384 "
    f"model.max_sequence_length={ROW} model.logprob_chunk_tokens=256 parallel.micro_batch_tokens={ROW} "
    "objective.actor_freeze_steps=0 run.name=memory"
).split()
# name -> (processes, overrides)
LAYOUTS: dict[str, tuple[int, str]] = {
    "one rank": (1, ""),
    "selective recompute": (1, "parallel.recompute=selective"),
    "full recompute": (1, "parallel.recompute=full"),
    "rows of 1,024": (1, "parallel.micro_batch_tokens=1024 model.max_sequence_length=1024"),
    "TP2": (2, "parallel.tensor=2"),
    "TP2, SP": (2, "parallel.tensor=2 parallel.sequence=true"),
    "PP2": (2, "parallel.pipeline=2"),
    "PP2, full recompute": (2, "parallel.pipeline=2 parallel.recompute=full"),
    "DP2": (2, ""),
    "DP2, distributed optimizer": (2, "parallel.distributed_optimizer=true"),
    "CP2": (2, "parallel.context=2"),
}
PHASES = ("score", "train reward model", "train policy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", nargs="*", default=list(LAYOUTS), choices=list(LAYOUTS), metavar="NAME")
    parser.add_argument("--rank", metavar="NAME", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        print("MEASURED " + json.dumps(measured_here(arguments.rank)), flush=True)
        return
    print(f"{'layout':28}{'phase':20}{'measured':>10}{'planned':>10}{'error':>8}   MiB of the fullest rank")
    errors = []
    for name in arguments.layouts:
        measured, planned = measure(name), plan(name)
        for phase in PHASES:
            error = planned[phase] / measured[phase] - 1
            errors.append(error)
            print(f"{name:28}{phase:20}{measured[phase]:10.0f}{planned[phase]:10.0f}{error:+8.1%}", flush=True)
    print(f"{len(errors)} figures: {min(errors):+.1%} to {max(errors):+.1%} (aim: within 15%)")


def configuration(name: str) -> TrainConfig:
    processes, overrides = LAYOUTS[name]
    raw = composed(["experiment=arithmetic", *MODEL, f"resources.trainer_devices={processes}", *overrides.split()])
    return parse_config(resolved(raw))


def plan(name: str) -> dict[str, float]:
    """MiB by phase: the fullest stage."""
    from oreal_megatron.launch.command import planner_of

    config = configuration(name)
    memory = planner_of(config)(config).memory
    return {phase: max(m.total for m in memory.phases if m.phase == phase) / 2**20 for phase in PHASES}


def measure(name: str) -> dict[str, float]:
    """MiB by phase: the fullest rank."""
    processes, _ = LAYOUTS[name]
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    outcome = subprocess.run(
        [sys.executable, *command, "-m", "benchmarks.memory", "--rank", name],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
    )
    lines = [line.split("MEASURED ", 1)[1] for line in outcome.stdout.splitlines() if "MEASURED " in line]
    if len(lines) != processes:
        raise RuntimeError(f"{name}: {outcome.stderr[-3000:]}")
    ranks = [json.loads(line) for line in lines]
    return {phase: max(rank[phase] for rank in ranks) for phase in PHASES}


def measured_here(name: str) -> dict[str, float]:
    """MiB by phase, of this rank: its peak less what it had after the imports."""
    import torch
    from megatron.core import parallel_state  # noqa: F401,TID251  # an import of the baseline

    from oreal_megatron import updates
    from oreal_megatron.data.packing import PackedSequence, Packer
    from oreal_megatron.models.architecture import build_gpt
    from oreal_megatron.models.optimizer import TrainedModel
    from oreal_megatron.models.policy import Policy
    from oreal_megatron.models.token_reward import TokenRewardModel
    from oreal_megatron.objective.terms import TokenCounts
    from oreal_megatron.parallel.device import device_seam
    from oreal_megatron.parallel.groups import parallel_groups

    config = configuration(name)
    geometry, objective = config.model.geometry, config.objective
    assert geometry is not None and geometry.vocab_size is not None
    torch.set_num_threads(1)
    with device_seam(), parallel_groups(config.parallel, seed=0) as groups:
        torch.ones(64, 64) @ torch.ones(64, 64)
        baseline = peak_since_reset()

        def build(cls: Any) -> Any:
            vocabulary = geometry.vocab_size
            assert vocabulary is not None
            return build_gpt(cls, geometry, config.model, groups, vocab_size=vocabulary, seed=0, tied_embeddings=False)

        modules = [build(Policy), build(Policy)]
        for module in modules:
            module.logprob_chunk_tokens = config.model.logprob_chunk_tokens
        policy, reference, reward_model = *modules, build(TokenRewardModel)
        policy = TrainedModel(policy, config.optimizer.policy, groups, num_updates=10)
        reward_model = TrainedModel(reward_model, config.optimizer.reward_model, groups, num_updates=10)
        length = config.model.max_sequence_length
        generator = torch.Generator().manual_seed(0)
        sequences = []
        for index in range(4 * groups.data_size):
            ids = tuple(torch.randint(0, geometry.vocab_size, (length,), generator=generator).tolist())
            sequences.append(
                PackedSequence(
                    id=str(index),
                    prompt_ids=ids[:64],
                    response_ids=ids[64:],
                    correct=index % 2 == 0,
                    advantage=1.0 if index % 2 == 0 else -1.0,
                    rollout_logprobs=(-9.0,) * (length - 64),
                )
            )
        batches = Packer.of_layout(groups, geometry, geometry.vocab_size).batches(sequences)
        counts = TokenCounts(*(sum(len(s.response_ids) for s in sequences if s.correct is c) for c in (True, False)))
        peaks = {}
        # The second round is a step like all that follow.
        for _ in range(2):
            reset_peak()
            scored_by_reference = updates.with_reference(reference, batches, groups)
            peaks["score"] = peak_since_reset() - baseline
            reset_peak()
            scored, _ = updates.update_reward_model(
                reward_model, scored_by_reference, objective, num_sequences=len(sequences)
            )
            peaks["train reward model"] = peak_since_reset() - baseline
            weighted = updates.with_token_weights(scored_by_reference, scored, objective)
            reset_peak()
            updates.update_policy(policy, weighted, objective, counts)
            peaks["train policy"] = peak_since_reset() - baseline
    return peaks


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def peak_since_reset() -> float:
    """MiB."""
    fields: dict[str, Any] = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) / 1024


if __name__ == "__main__":
    main()
