"""The Transformer Engine layer spec without a GPU: names, sharded state, weights both ways, FP8 state, refusals.

Megatron-Core's wrappers are real; what they wrap is stood in for by tests/transformer_engine_stand_in, in a process
of its own: without an importable Transformer Engine, Megatron-Core cannot even name the spec's classes. In this process
it is absent, and what is asked of it must be refused.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from megatron.core.extensions.transformer_engine import HAVE_TE

from oreal_megatron.checkpoint.state import load_weights_only, weights_only
from oreal_megatron.checkpoint.store import CheckpointStore
from oreal_megatron.config import Fp8ModelConfig
from oreal_megatron.conversion.convert import to_huggingface
from oreal_megatron.conversion.huggingface import geometry_of
from oreal_megatron.conversion.naming import checkpoint_name
from oreal_megatron.data.packing import pack
from oreal_megatron.models.gpt import check_layers
from oreal_megatron.models.pipeline_schedule import score
from tests.conftest import ROOT
from tests.tiny_models import save_tiny
from tests.unit.transformer_engine.tiny_policy import CPU, SEQUENCES, tiny_policy


@pytest.mark.skipif(HAVE_TE, reason="what is refused without Transformer Engine, and it is there")
def test_fp8_that_megatron_ignores_is_refused_after_building(tmp_path, single_process):
    geometry = geometry_of(save_tiny(tmp_path / "hf", "llama", tied=False))
    fp8 = Fp8ModelConfig(
        recipe="blockwise", format="e4m3", bf16_first_layers=0, bf16_last_layers=0, amax_history=None, parameters=False
    )
    with pytest.raises(RuntimeError, match="layer 0 does not compute in FP8"):
        tiny_policy(geometry, single_process, "local", fp8)
    with pytest.raises(ValueError, match="Transformer Engine does not import"):
        tiny_policy(geometry, single_process, "transformer_engine")
    with pytest.raises(RuntimeError, match="has a ColumnParallelLinear where"):
        check_layers(tiny_policy(geometry, single_process, "local"), "transformer_engine")


@pytest.mark.distributed
@pytest.mark.parametrize(("family", "tied"), [("qwen2", True), ("qwen3", False)])
def test_checkpoints_of_either_implementation_are_the_others(tmp_path, single_process, family, tied):
    hf = save_tiny(tmp_path / "hf", family, tied=tied)
    local = tiny_policy(geometry_of(hf), single_process, "local", load=hf)
    store = CheckpointStore(tmp_path / "checkpoints", single_process, keep=9)
    store.save("local", weights_only("policy", local))
    (logprobs,) = score(local, [pack(SEQUENCES, CPU)], lambda out, batch: out[batch.predicting].clone(), single_process)
    torch.save(logprobs, tmp_path / "logprobs.pt")

    worker = [sys.executable, "-m", "tests.unit.transformer_engine.stand_in_worker", str(tmp_path)]
    path = f"{ROOT}/tests/transformer_engine_stand_in:{ROOT}"
    outcome = subprocess.run(
        worker, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    )
    assert outcome.returncode == 0, outcome.stderr[-4000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["recipe"]["amax_history_len"] == "16" and result["recipe"]["amax_compute_algo"] == "max"
    assert "HYBRID" in result["recipe"]["fp8_format"]
    assert "layer 0 has a TELayerNormColumnParallelLinear" in result["wrong_layers"]
    assert "layer 0 has a ColumnParallelLinear" in result["wrong_implementation"]

    # And back, exactly, name by name.
    back = tiny_policy(geometry_of(hf), single_process, "local")
    again = CheckpointStore(tmp_path / "checkpoints", single_process, keep=9)
    assert not load_weights_only("policy", back, again.load("transformer_engine", weights_only("policy", back)))
    for (name, mine), (_, other) in zip(local.named_parameters(), back.named_parameters(), strict=True):
        assert torch.equal(mine, other), (name, checkpoint_name(name))
    # A run's checkpoint with FP8 state in it goes out to Hugging Face like any other.
    checkpoint = tmp_path / "checkpoints" / "step_000001"
    to_huggingface(checkpoint, tmp_path / "back", prefix="policy.", assets=hf)
    assert (tmp_path / "back" / "model.safetensors").is_file()
