"""GRPO of this project against TRL's GRPOTrainer, in response tokens a second, on one core each.

    python -m benchmarks.trl [--pairs 12]

Both train the same model, which this script makes: the policy of `experiment=arithmetic` after its warm start, exported
to a Hugging Face directory. Every step has 8 responses to each of the same 48 prompts, at most 64 tokens long, sampled
at temperature 1 and top-p 1, a reward of right or wrong, a KL term with the weight 0.01, and one update in fp32, with a
learning rate that changes next to nothing. Each side is a process with one thread on the same core. The sides take
turns: one does a step while the other waits for its turn. A step's time is that from its turn to the next time that the
process waits, so it has everything that a step does, with logging. The first step of each is left out. Tokens are
those of the responses, with the end of turn.

TRL runs in .venv/trl (`make bench-trl`) with the settings of `trl_trainer`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.plain_run import PLAIN_RUN

PROMPTS, SAMPLES, NEW_TOKENS, BETA = 48, 8, 64, 0.01
TRL_PYTHON = Path(".venv/trl/bin/python")
LEARNING_RATE = 1e-9


@dataclass(frozen=True)
class Step:
    """A timed step of one side."""

    seconds: float
    tokens: int
    phases: Mapping[str, float]

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


class Side:
    """A process that trains, and does a step whenever it gets a line; see `Turns`."""

    def __init__(self, python: Path, name: str, directory: Path, arguments: Sequence[str]):
        self._log = directory / f"{name}.log"
        core = max(os.sched_getaffinity(0))
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [python, "-m", "benchmarks.trl", "--side", name, "--directory", str(directory), *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                preexec_fn=lambda: os.sched_setaffinity(0, {core}),
            )
        self._wait()

    def step(self) -> Step:
        """Has the process do a step."""
        start = time.perf_counter()
        self._write("go")
        report = self._wait()
        return Step(time.perf_counter() - start, report["tokens"], report["phases"])

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _write(self, line: str) -> None:
        assert self._process.stdin is not None
        print(line, file=self._process.stdin, flush=True)

    def _wait(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a side ended early: see {self._log}:\n{self._log.read_text()[-2000:]}")
        report: dict[str, Any] = json.loads(line)
        return report


class Turns:
    """The process's end of a `Side`: reports the last step, and waits for the next turn."""

    def __init__(self) -> None:
        # Whatever else the process prints is not for the other end.
        self._reports = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self.tokens = 0
        self.phases: dict[str, float] = {}

    def wait(self) -> None:
        """Waits for the next turn. Ends the process when the other end has closed."""
        print(json.dumps({"tokens": self.tokens, "phases": self.phases}), file=self._reports, flush=True)
        self.tokens, self.phases = 0, {}
        if not sys.stdin.readline():
            os._exit(0)


def exported_model(directory: Path) -> Path:
    """Trains the warm start of `experiment=arithmetic`, and returns the exported policy after one step of GRPO."""
    run = directory / "warm_start"
    settings = ["experiment=arithmetic", "objective=grpo", "run.num_steps=1", *PLAIN_RUN, f"run.dir={run}"]
    subprocess.run([sys.executable, "-m", "oreal_megatron.cli.train", *settings, "run.export=best"], check=True)
    return run / "huggingface" / "step_000001" / "policy"


def ours(model: Path, directory: Path) -> list[str]:
    """Returns the settings of this project's side."""
    return [
        "experiment=arithmetic",
        "objective=grpo",
        f"objective.beta={BETA}",
        "model=huggingface",
        f"model.path={model}",
        "model.max_sequence_length=128",
        "sft=none",
        f"data.arithmetic.num_train={PROMPTS}",
        f"data.prompts_per_step={PROMPTS}",
        f"rollout.samples_per_prompt={SAMPLES}",
        f"rollout.sampling={{temperature: 1.0, top_p: 1.0, max_new_tokens: {NEW_TOKENS}}}",
        f"optimizer.policy={{lr: {LEARNING_RATE}, min_lr: {LEARNING_RATE}}}",
        "run.num_steps=1000000",
        "run.export=none",
        *PLAIN_RUN,
        f"run.dir={directory / 'ours'}",
    ]


def write_prompts(model: Path, path: Path) -> None:
    """Writes the prompts of `ours` with their tokens and answers, for TRL's side."""
    from oreal_megatron.compose import composed, resolved
    from oreal_megatron.config import parse_config
    from oreal_megatron.data.arithmetic import generate_arithmetic
    from oreal_megatron.data.prompting import PromptRenderer
    from oreal_megatron.data.tokenizer import load_tokenizer

    config = parse_config(resolved(composed(ours(model, path.parent))))
    tokenizer = load_tokenizer(str(model))
    renderer = PromptRenderer(tokenizer, config.prompt, vocab_size=len(tokenizer))
    assert config.data.arithmetic is not None
    prompts = generate_arithmetic(config.data.arithmetic, config.run.seed).train
    records = [
        {
            "prompt": renderer.question_text(prompt.question),
            "ids": list(renderer.token_ids(prompt)),
            "answer": prompt.gold_answer,
        }
        for prompt in prompts
    ]
    path.write_text(json.dumps(records))


def train_ours(model: Path, directory: Path) -> None:
    """Trains with this project."""
    from oreal_megatron import train
    from oreal_megatron.cli.train import main as train_main

    turns, step_of = Turns(), train.train_step

    def in_turn(run: Any) -> Any:
        turns.wait()
        report = step_of(run)
        turns.tokens = round(report.metrics["rollout/responses"] * report.metrics["rollout/response_tokens"])
        turns.phases = {**report.seconds}
        return report

    train.train_step = in_turn
    sys.argv = ["oreal-train", *ours(model, directory)]
    train_main()


def train_trl(model: Path, directory: Path, micro_batch: int) -> None:
    """Trains with TRL."""
    trl_trainer(model, directory, micro_batch, Turns()).train()


def trl_trainer(model: Path, directory: Path, micro_batch: int, turns: Turns) -> Any:
    """Makes TRL's trainer, without what costs it time and has no counterpart here: checkpoints, reports, progress bars.

    micro_batch: responses of a forward and backward pass; all 384 are generated at once in any case.
    """
    import torch
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    records = json.loads((directory / "prompts.json").read_text())
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    assert tokenizer(text=[record["prompt"] for record in records])["input_ids"] == [r["ids"] for r in records]

    def reward(completions: Sequence[str], completion_ids: Sequence[Sequence[int]], answer: Sequence[str], **_: Any):  # type: ignore[no-untyped-def]
        turns.tokens = sum(map(len, completion_ids))
        return [float(f"\\boxed{{{right}}}" in text) for text, right in zip(completions, answer, strict=True)]

    class InTurn(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            turns.wait()

    config = GRPOConfig(
        output_dir=str(directory / "trl"),
        use_cpu=True,
        bf16=False,
        model_init_kwargs={"dtype": "float32", "attn_implementation": "sdpa"},
        gradient_checkpointing=False,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=PROMPTS * SAMPLES // micro_batch,
        num_generations=SAMPLES,
        max_completion_length=NEW_TOKENS,
        temperature=1.0,
        top_p=1.0,
        beta=BETA,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_steps=1_000_000,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(
        model=str(model),
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": r["prompt"], "answer": r["answer"]} for r in records]),
        processing_class=tokenizer,
        callbacks=[InTurn()],
    )
    _timed(trainer, "_generate_single_turn", turns, lambda: "generate")
    _timed(trainer, "_get_per_token_logps_and_entropies", turns, lambda: None if torch.is_grad_enabled() else "score")
    return trainer


def _timed(trainer: Any, method: str, turns: Turns, phase: Callable[[], str | None]) -> None:
    """Adds the seconds of a method's calls to a phase."""
    work = getattr(trainer, method)

    def timed(*args: Any, **kwargs: Any) -> Any:
        name, start = phase(), time.perf_counter()
        result = work(*args, **kwargs)
        if name is not None:
            turns.phases[name] = turns.phases.get(name, 0.0) + time.perf_counter() - start
        return result

    setattr(trainer, method, timed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--micro-batch", type=int, default=48, help="responses of a pass of TRL's; 48 is its fastest")
    parser.add_argument("--model", type=Path, help="exported policy; none: one is trained (a minute)")
    parser.add_argument("--side", choices=("ours", "trl"), help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side == "ours":
        train_ours(arguments.model, arguments.directory)
    elif arguments.side == "trl":
        train_trl(arguments.model, arguments.directory, arguments.micro_batch)
    else:
        with tempfile.TemporaryDirectory() as temporary:
            directory = Path(temporary)
            model = arguments.model or exported_model(directory)
            write_prompts(model, directory / "prompts.json")
            options = ["--model", str(model.resolve()), "--micro-batch", str(arguments.micro_batch)]
            sides = [Side(Path(sys.executable), "ours", directory, options)]
            try:
                sides.append(Side(TRL_PYTHON, "trl", directory, options))
                print_comparison([tuple(side.step() for side in sides) for _ in range(1 + arguments.pairs)][1:])
            finally:
                for side in sides:
                    side.close()


def print_comparison(pairs: Sequence[tuple[Step, ...]]) -> None:
    """Prints rates, medians of phases, and the median of the pairs' ratios."""
    for name, steps in zip(("oreal_megatron", "TRL"), zip(*pairs, strict=True), strict=True):
        phases = "  ".join(f"{phase} {_median(s.phases[phase] for s in steps):.3f}" for phase in steps[0].phases)
        print(
            f"{name:15} {_median(step.rate for step in steps):6.0f} response tokens/s, "
            f"{_median(step.tokens for step in steps):.0f} tokens and {_median(step.seconds for step in steps):.3f} s "
            f"a step  ({phases})"
        )
    ratio = _median(mine.rate / theirs.rate for mine, theirs in pairs)
    print(f"ours / TRL: {ratio:.2f} (median of {len(pairs)} pairs)")


def _median(values: Iterable[float]) -> float:
    return statistics.median(list(values))


if __name__ == "__main__":
    main()
