"""A run whose server keeps old weights under a new label, with the audit turned off: `URL MODEL DIRECTORY OUTPUT.json`.

Only the difference between both sides' log-probabilities is left to notice it. OUTPUT: that difference in a healthy
step and in one with stale rollouts, what the run said, the error of a step beyond rollout.mismatch.stop, and whether
that step has left the policy as it was.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import torch

from oreal_megatron.builder import build_run
from oreal_megatron.compose import composed, validated
from oreal_megatron.initial_policy import make_initial_policy
from oreal_megatron.pass_rates import prepare
from oreal_megatron.rollout.sglang_engine import SGLangEngine
from oreal_megatron.run_state import Run
from oreal_megatron.step import UpdateRefused
from oreal_megatron.stopping import StopRequest
from oreal_megatron.train import train_step
from oreal_megatron.weight_sync.types import TransferResult
from oreal_megatron.workspace import opened_workspace
from tests.tiny_servers import MAX_SEQUENCE_LENGTH, ListHandler

DIFFERENCE = "policy/rollout_logprob_difference"


def main(url: str, model: str, directory: str) -> dict[str, Any]:
    config = validated(
        composed(
            [
                "experiment=arithmetic",
                "rollout=sglang_cpu",
                "objective=nsr",  # trains on what is wrong, which is all that random weights say
                "model=huggingface",
                f"model.path={model}",
                "model.tokenizer=arithmetic",
                f"model.max_sequence_length={MAX_SEQUENCE_LENGTH}",
                "prompt.stop_token='2'",  # the id that the server stops at
                "sft=none",
                "evaluation=none",
                "evaluation.every=0",
                "data.pass_rate=null",
                "data.difficulty_balance=[]",
                "data.prompts_per_step=4",
                "rollout.samples_per_prompt=4",
                "rollout.sampling.max_new_tokens=24",
                "rollout.mismatch={warn: 1.0e-3, stop: 100.0}",
                f"rollout.sglang.urls=['{url}']",
                "optimizer.policy={lr: 1.0e-2, min_lr: 1.0e-2, warmup_steps: 0}",
                "parallel.micro_batch_tokens=512",
                "tracking.console=plain",
                "tracking.tensorboard=false",
                "tracking.wandb=disabled",
                "tracking.report=false",
                "run.threads=1",
                f"run.dir={directory}",
            ]
        )
    )
    said: list[str] = []
    with opened_workspace(config, StopRequest()) as workspace:
        make_initial_policy(workspace)
        run = build_run(workspace)
        prepare(run)
        logging.getLogger("oreal_megatron").addHandler(ListHandler(said))
        healthy = stepped(run)
        assert isinstance(run.engine, SGLangEngine)
        plant(run.engine)
        stepped(run)  # the last one whose rollouts are the policy's
        before = list(said)
        stale = stepped(run)
        limits = {"mismatch": run.config.rollout.mismatch.model_copy(update={"stop": stale / 10})}
        rollout = run.config.rollout.model_copy(update=limits)
        run.config = run.config.model_copy(update={"rollout": rollout})
        weights = [parameter.detach().clone() for parameter in run.policy.module.parameters()]
        error = None
        try:
            stepped(run)
        except UpdateRefused as found:
            error = str(found)
        pairs = zip(weights, run.policy.module.parameters(), strict=True)
        is_unchanged = all(torch.equal(old, new) for old, new in pairs)
    return {
        "healthy": healthy,
        "stale": stale,
        "said_before": before,
        "said": said[len(before) :],
        "error": error,
        "is_unchanged": is_unchanged,
    }


def plant(engine: SGLangEngine) -> None:
    """From now on nothing is sent, and nothing compared: the server gets new labels alone."""
    publisher: Any = engine.publisher
    publisher._transport.send = lambda servers: TransferResult()
    publisher._auditor.audit = lambda servers, sums, known: ({}, 0.0)


def stepped(run: Run) -> float:
    report = train_step(run)
    run.progress.step += 1
    return report.metrics[DIFFERENCE]


if __name__ == "__main__":
    Path(sys.argv[4]).write_text(json.dumps(main(*sys.argv[1:4])))
