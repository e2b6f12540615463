"""Takes a model with stood-in Transformer Engine layers from building to a loaded checkpoint (test_layer_spec.py)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import (
    TEColumnParallelLinear,
    TEDotProductAttention,
    TELayerNormColumnParallelLinear,
    TERowParallelLinear,
)
from megatron.core.fp8_utils import get_fp8_recipe

from oreal_megatron.checkpoint.state import load_trained, load_weights_only, trained_state, weights_only
from oreal_megatron.checkpoint.store import CheckpointStore
from oreal_megatron.config import AdamWConfig, Fp8ModelConfig, ParallelConfig
from oreal_megatron.conversion.huggingface import geometry_of, read_model
from oreal_megatron.conversion.module import load_weights, shard_parameters
from oreal_megatron.data.packing import pack
from oreal_megatron.distributed.cpu_backend import cpu_backend
from oreal_megatron.distributed.groups import ParallelGroups, parallel_groups
from oreal_megatron.models.gpt import check_layers
from oreal_megatron.models.pipeline_schedule import score
from oreal_megatron.models.trained_model import TrainedModel
from tests.tiny_models import LOGPROB_ROUNDING
from tests.unit.transformer_engine.tiny_policy import CPU, SEQUENCES, tiny_policy

TENSORWISE = Fp8ModelConfig(
    recipe="tensorwise", format="hybrid", bf16_first_layers=0, bf16_last_layers=1, amax_history=None, parameters=False
)
DELAYED = TENSORWISE.model_copy(update={"recipe": "delayed", "bf16_last_layers": 0, "amax_history": 16})
ADAMW = AdamWConfig(
    lr=1e-3, min_lr=1e-3, warmup_steps=0, decay_steps=10, weight_decay=0.0, betas=(0.9, 0.99), eps=1e-4, clip_grad=1.0
)


def run(directory: Path, groups: ParallelGroups) -> dict[str, Any]:
    geometry = geometry_of(directory / "hf")
    store = CheckpointStore(directory / "checkpoints", groups, keep=9)
    policy = tiny_policy(geometry, groups, "transformer_engine", TENSORWISE)
    layer = policy.decoder.layers[0]
    assert isinstance(layer.self_attention.linear_qkv, TELayerNormColumnParallelLinear)
    assert isinstance(layer.self_attention.core_attention, TEDotProductAttention)
    assert isinstance(layer.self_attention.linear_proj, TERowParallelLinear)
    assert isinstance(layer.mlp.linear_fc1, TELayerNormColumnParallelLinear)
    assert not isinstance(layer.mlp.linear_fc2, TEColumnParallelLinear)

    # A checkpoint of the local layers, under the names of these, and what it computes.
    assert not load_weights_only("policy", policy, store.load("local", weights_only("policy", policy)))
    (found,) = score(policy, [pack(SEQUENCES, CPU)], lambda out, batch: out[batch.predicting], groups)
    torch.testing.assert_close(found, torch.load(directory / "logprobs.pt"), atol=LOGPROB_ROUNDING, rtol=0)
    store.save("transformer_engine", weights_only("policy", policy))

    # The same from the Hugging Face directory; every parameter is known to the conversion's table.
    again = tiny_policy(geometry, groups, "transformer_engine", TENSORWISE)
    load_weights(again, directory / "hf", groups)
    for (name, mine), (_, other) in zip(policy.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(mine, other), name
    table = read_model(directory / "hf").table
    assert {item.entry.name for item in shard_parameters(policy, table, groups)} == set(table.entries)

    # FP8 state goes into a run's checkpoints and comes back.
    trained = one_update(tiny_policy(geometry, groups, "transformer_engine", DELAYED, load=directory / "hf"), groups)
    assert all(part.config.fp8_recipe == "delayed" for part in trained._parts())
    store.save("step_000001", trained_state("policy", trained))
    resumed = TrainedModel(
        tiny_policy(geometry, groups, "transformer_engine", DELAYED, load=directory / "hf"),
        ADAMW,
        groups,
        num_updates=9,
    )
    assert amax_of(resumed.module) == {}
    load_trained("policy", resumed, store.load("step_000001", trained_state("policy", resumed, is_loading=True)))
    assert amax_of(resumed.module) == amax_of(trained.module) and len(amax_of(trained.module)) == 8
    for (name, mine), (_, other) in zip(
        trained.module.named_parameters(), resumed.module.named_parameters(), strict=True
    ):
        assert torch.equal(mine, other), name

    master_weights_of_fp8_parameters(directory, store, groups)
    broken = tiny_policy(geometry, groups, "local", None)
    broken.config.fp8 = "hybrid"
    return {
        "recipe": {k: str(v) for k, v in get_fp8_recipe(trained.module.config).asked.items()},
        "wrong_layers": refusal(lambda: check_layers(policy, "local")),
        "wrong_implementation": refusal(lambda: check_layers(broken, "transformer_engine")),
    }


def one_update(module: Any, groups: ParallelGroups) -> TrainedModel:
    trained = TrainedModel(module, ADAMW, groups, num_updates=9)
    trained.forward_backward([pack(SEQUENCES, CPU)], lambda out, batch: (-out[batch.predicting, 0].sum(), None))
    trained.update()
    return trained


def master_weights_of_fp8_parameters(directory: Path, store: CheckpointStore, groups: ParallelGroups) -> None:
    """Weights in FP8 round what was loaded; what they are made of, and so the master weights, does not."""
    geometry = geometry_of(directory / "hf")
    whole = tiny_policy(geometry, groups, "transformer_engine", None, load=directory / "hf")
    fp8 = TENSORWISE.model_copy(update={"parameters": True, "bf16_last_layers": 0})
    policy = tiny_policy(geometry, groups, "transformer_engine", fp8)
    load_weights_only("policy", policy, store.load("local", weights_only("policy", policy)))
    weight, exact = (p.decoder.layers[0].mlp.linear_fc2.weight for p in (policy, whole))
    assert type(weight).__name__ != type(exact).__name__ and not torch.equal(weight.dequantize(), exact)
    assert torch.equal(weight.get_high_precision_init_val(), exact)
    # Written as what it stands for: a reader needs no FP8.
    written = weights_only("policy", policy)["policy.decoder.layers.0.mlp.linear_fc2.weight"].data
    assert type(written) is torch.Tensor and torch.equal(written, weight.dequantize())


def amax_of(module: torch.nn.Module) -> dict[str, float]:
    held = {name: getattr(part, "amax_history", None) for name, part in module.named_modules()}
    return {name: float(value) for name, value in held.items() if value is not None}


def refusal(build: Any) -> str:
    try:
        build()
    except RuntimeError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    where = Path(sys.argv[1])
    with cpu_backend(), parallel_groups(ParallelConfig(tensor=1, pipeline=1, micro_batch_tokens=512), seed=0) as one:
        (where / "result.json").write_text(json.dumps(run(where, one)))
