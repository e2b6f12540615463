"""Where models are made; and our FP8 settings as Megatron-Core's, whose checks must refuse the same."""

from __future__ import annotations

import pytest
import torch
from megatron.core.models.gpt import GPTModel

from oreal_megatron.config import Fp8ModelConfig, GeometryConfig, ModelConfig
from oreal_megatron.config.fp8_recipes import RECIPES
from oreal_megatron.models.gpt import build_gpt, transformer_config

GEOMETRY = GeometryConfig(num_layers=4, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4, num_query_groups=2)
MODEL = ModelConfig(
    path=None, geometry=GEOMETRY, tokenizer="unused", implementation="local", dtype="bfloat16", max_sequence_length=64
)


def fp8(recipe, **changed) -> Fp8ModelConfig:
    values = {"bf16_first_layers": 0, "bf16_last_layers": 0, "amax_history": None, "parameters": False} | changed
    return Fp8ModelConfig(recipe=recipe, format="hybrid", **values)


def test_none_asks_for_nothing(single_process):
    config = transformer_config(GEOMETRY, MODEL, single_process)
    assert config.fp8 is None and not config.fp8_param and not config.first_last_layers_bf16


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_setting_arrives(single_process, recipe):
    ends = {} if recipe == "delayed" else {"bf16_first_layers": 2, "bf16_last_layers": 1}
    asked = fp8(recipe, amax_history=64 if recipe == "delayed" else None, parameters=True, **ends)
    config = transformer_config(GEOMETRY, MODEL, single_process, asked)
    assert (config.fp8, config.fp8_recipe, config.fp8_param) == ("hybrid", recipe, True)
    assert config.first_last_layers_bf16 == bool(ends)
    assert config.num_layers_at_start_in_bf16 == asked.bf16_first_layers
    assert config.num_layers_at_end_in_bf16 == asked.bf16_last_layers
    assert config.tp_only_amax_red
    if recipe == "delayed":
        assert (config.fp8_amax_history_len, config.fp8_amax_compute_algo) == (64, "max")


def test_megatron_refuses_what_ours_refuses(single_process):
    with pytest.raises(ValueError, match="does not support first / last layer in BF16"):
        transformer_config(GEOMETRY, MODEL, single_process, fp8("delayed", amax_history=1, bf16_first_layers=1))
    with pytest.raises(ValueError, match="must be between 0 and number of layers per pipeline stage"):
        transformer_config(GEOMETRY, MODEL, single_process, fp8("tensorwise", bf16_last_layers=5))


@pytest.mark.parametrize(("recompute", "modules"), [("none", None), ("selective", ["core_attn", "mlp"])])
def test_recomputation(single_process, recompute, modules):
    from dataclasses import replace

    layout = single_process.layout.model_copy(update={"recompute": recompute})
    config = transformer_config(GEOMETRY, MODEL, replace(single_process, layout=layout))
    assert config.recompute_granularity == (None if recompute == "none" else recompute)
    assert modules is None or config.recompute_modules == modules


def test_every_parameter_is_made_on_the_device(single_process, monkeypatch):
    """Also those of torch's own modules, such as norms; meta stands for a GPU."""
    meta = torch.device("meta")
    monkeypatch.setattr("oreal_megatron.models.gpt.device", lambda: meta)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: meta)  # where Megatron-Core makes its parameters
    policy = build_gpt(GPTModel, GEOMETRY, MODEL, single_process, vocab_size=105, seed=None, tied_embeddings=False)
    assert {parameter.device for parameter in policy.parameters()} == {meta}
