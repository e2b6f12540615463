"""Tiny runs through the command line, for tests."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TINY = (
    "experiment=arithmetic",
    "run.threads=1",
    "tracking.console=plain",
    "tracking.wandb=disabled",
    "tracking.tensorboard=false",
    "model.geometry.hidden_size=32",
    "model.geometry.ffn_hidden_size=64",
    "model.geometry.num_layers=2",
    "data.arithmetic.num_train=48",
    "data.arithmetic.num_heldout=16",
    "data.arithmetic.num_demonstrations=512",
    "data.arithmetic.min_terms=2",
    "data.arithmetic.max_terms=3",
    "data.arithmetic.max_operand=9",
    "data.arithmetic.direct_shares=[0.0,0.0]",
    "data.arithmetic.operators=['+']",
    "data.difficulty_balance=[]",
    "data.pass_rate=null",
    "data.prompts_per_step=8",
    "rollout.samples_per_prompt=4",
    "rollout.sampling.max_new_tokens=24",
    "evaluation.every=2",
    "sft.steps=150",
    "sft.optimizer.lr=0.01",
    "optimizer.policy={lr: 3.0e-4, min_lr: 1.0e-4}",
    "run.num_steps=4",
    "run.checkpoint_every=2",
    "objective.actor_freeze_steps=1",
)

Outcome = subprocess.CompletedProcess

# A process that has imported everything already, to fork runs from: the imports take longer than a tiny run.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["oreal_megatron.builder", "oreal_megatron.report"])


def invoke(*overrides: str, num_processes: int = 1, flags: tuple[str, ...] = (), timeout: float = 300) -> Outcome[str]:
    """`oreal-train` on the tiny experiment; overrides come last, so they win. Several processes start by torchrun."""
    return command_line(*flags, *TINY, *overrides, num_processes=num_processes, timeout=timeout)


def command_line(
    *arguments: str, num_processes: int = 1, new_interpreter: bool = False, timeout: float = 300
) -> Outcome[str]:
    """`oreal-train` with exactly these arguments."""
    if num_processes > 1 or new_interpreter:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
        launcher = torchrun if num_processes > 1 else []
        command = [sys.executable, *launcher, "-m", "oreal_megatron.cli.train", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    with tempfile.TemporaryDirectory() as directory:
        out, err = Path(directory, "out"), Path(directory, "err")
        process = FORKS.Process(target=command_in_fork, args=(arguments, str(out), str(err)))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(arguments, timeout, out.read_bytes(), err.read_bytes())
        return Outcome(arguments, process.exitcode, out.read_text(), err.read_text())


def command_in_fork(arguments: tuple[str, ...], out: str, err: str, command: str = "train") -> None:
    """Runs `oreal-train`, or another command, with exactly these arguments in a forked process; appends its output."""
    for path, stream in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), stream)
    sys.argv = [f"oreal-{command}", *arguments]
    importlib.import_module(f"oreal_megatron.cli.{command}").main()


def metrics_of(directory: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without times and memory."""
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in ("seconds", "peak_gib")} for record in records]
