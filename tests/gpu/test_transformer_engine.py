"""Transformer Engine's layers against the local ones, and each FP8 recipe against bf16 and against its emulation."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.fp8_emulation import emulate_fp8
from oreal_megatron.checkpoint.state import load_trained, trained_state
from oreal_megatron.checkpoint.store import CheckpointStore
from oreal_megatron.config import AdamWConfig, Fp8ModelConfig
from oreal_megatron.config.fp8_recipes import RECIPES, device_problem
from oreal_megatron.conversion.huggingface import geometry_of
from oreal_megatron.conversion.naming import checkpoint_name
from oreal_megatron.data.packing import PackedSequence, Padding, pack
from oreal_megatron.distributed.cpu_backend import device
from oreal_megatron.machine.probe import probe
from oreal_megatron.models.trained_model import TrainedModel
from tests.tiny_models import save_tiny
from tests.unit.transformer_engine.tiny_policy import tiny_policy

ADAMW = AdamWConfig(
    lr=1e-3, min_lr=1e-3, warmup_steps=0, decay_steps=10, weight_decay=0.0, betas=(0.9, 0.99), eps=1e-4, clip_grad=1.0
)
SEQUENCES = [
    PackedSequence(str(i), (1, 2, 3), tuple((7 * i + 3 * j) % 97 for j in range(40 + 9 * i))) for i in range(4)
]


@dataclass
class Passed:
    logprobs: Tensor
    gradient: Tensor
    model: TrainedModel


@pytest.fixture(scope="module", autouse=True)
def transformer_engine():
    found = probe(["transformer_engine"]).transformer_engine
    if found.found is None:
        pytest.skip(f"not run: {found.problem}")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    # Widths that every recipe takes.
    shape = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_layers": 4, "initializer_range": 0.05}
    return save_tiny(tmp_path_factory.mktemp("model") / "hf", "qwen3", tied=False, vocabulary=128, **shape)


@pytest.fixture
def passed(source, single_process):
    """Log-probabilities and gradient of a model in bf16, after so many passes."""

    def run(implementation, fp8=None, *, emulated=None, passes=1):
        geometry = geometry_of(source)
        policy = tiny_policy(geometry, single_process, implementation, fp8, load=source, dtype="bfloat16")
        if emulated is not None:
            emulate_fp8(policy, emulated)
        trained = TrainedModel(policy, ADAMW, single_process, num_updates=9)
        batch = pack(SEQUENCES, device(), Padding(row=128))

        def loss(out, batch):
            logprobs = out[batch.predicting, 0]
            return -logprobs.mean(), logprobs.detach().clone()

        for _ in range(passes):
            (logprobs,) = trained.forward_backward([batch], loss)
        # Each implementation has an order and names of its own.
        by_name = {checkpoint_name(name): p.main_grad for name, p in policy.named_parameters()}
        gradient = torch.cat([by_name[name].flatten().clone() for name in sorted(by_name)])
        return Passed(logprobs, gradient, trained)

    return run


def recipe(name) -> Fp8ModelConfig:
    if problem := device_problem(name, torch.cuda.get_device_capability()):
        pytest.skip(f"not run: {problem}")
    found = tuple(int(part) for part in str(torch.version.cuda).split(".")[:2])
    if found < RECIPES[name].cuda:
        pytest.skip(f"not run: {name} needs CUDA {RECIPES[name].cuda}, torch has {found}")
    history = 16 if name == "delayed" else None
    return Fp8ModelConfig(
        recipe=name, format="hybrid", bf16_first_layers=0, bf16_last_layers=0, amax_history=history, parameters=False
    )


def cosine(a: Passed, b: Passed) -> float:
    return F.cosine_similarity(a.gradient, b.gradient, dim=0).item()


def test_its_layers_compute_what_the_local_ones_do(passed):
    theirs, local = passed("transformer_engine"), passed("local")
    difference = (theirs.logprobs - local.logprobs).abs()
    assert difference.mean() < 0.05 and difference.max() < 0.5  # two orders of rounding in bf16
    assert cosine(theirs, local) > 0.995


@pytest.mark.parametrize("name", RECIPES)
def test_fp8_is_on_and_within_its_bounds(passed, name):
    fp8, passes = recipe(name), 2 if name == "delayed" else 1  # the first pass has no scales yet
    inside, outside = passed("transformer_engine", fp8, passes=passes), passed("transformer_engine")
    emulated = passed("local", emulated=fp8, passes=passes)
    difference = (inside.logprobs - outside.logprobs).abs().mean()
    assert 0 < difference < 0.5 and cosine(inside, outside) > 0.8  # random weights: as wide as the emulation's bounds
    # The emulation says how far: what a device does differently is small beside what FP8 does.
    expected = (emulated.logprobs - passed("local").logprobs).abs().mean()
    assert 0.5 < difference / expected < 2.0


def test_scales_of_delayed_scaling_come_back_with_a_checkpoint(passed, tmp_path, single_process):
    fp8 = recipe("delayed")
    trained = passed("transformer_engine", fp8, passes=3).model
    trained.update()
    store = CheckpointStore(tmp_path / "checkpoints", single_process, keep=1)
    store.save("step_000001", trained_state("policy", trained))
    resumed = passed("transformer_engine", fp8, passes=1).model
    load_trained("policy", resumed, store.load("step_000001", trained_state("policy", resumed, is_loading=True)))
    for (name, mine), (_, other) in zip(trained.module.named_modules(), resumed.module.named_modules(), strict=True):
        if "scaling_fwd" in (meta := getattr(mine, "fp8_meta", {})):
            assert torch.equal(meta["scaling_fwd"].amax_history, other.fp8_meta["scaling_fwd"].amax_history), name
            assert torch.equal(meta["scaling_fwd"].scale, other.fp8_meta["scaling_fwd"].scale), name
