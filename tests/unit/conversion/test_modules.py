"""Slices into modules: names of Transformer Engine's layers, errors, and mbridge as an oracle on Qwen2."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from megatron.core.models.gpt import GPTModel

from oreal_megatron.config import ModelConfig
from oreal_megatron.conversion.huggingface import geometry_of
from oreal_megatron.conversion.module import load_weights
from oreal_megatron.conversion.naming import checkpoint_name
from oreal_megatron.models.gpt import build_gpt
from tests.tiny_models import VOCABULARY, save_tiny
from tests.unit.conversion.test_round_trip import tensors_of


def empty(path: Path, groups: Any, *, vocabulary: int = VOCABULARY, **changed: Any) -> GPTModel:
    geometry = geometry_of(path).model_copy(update=changed)
    model = ModelConfig(
        path=None,
        geometry=geometry,
        tokenizer="unused",
        implementation="local",
        dtype="float32",
        max_sequence_length=64,
    )
    tied = geometry.tied_embeddings
    return build_gpt(GPTModel, geometry, model, groups, vocab_size=vocabulary, seed=0, tied_embeddings=tied)


def test_modules_with_transformer_engine_names_get_the_same_weights(tmp_path, single_process):
    source = save_tiny(tmp_path / "hf", "qwen3", tied=False)
    local = empty(source, single_process)
    load_weights(local, source, single_process)

    class FusedNames(torch.nn.Module):
        """The parameters of a Transformer Engine model: norms belong to the linear layer behind them."""

        def __init__(self) -> None:
            super().__init__()
            self.shapes = {checkpoint_name(name): p.shape for name, p in local.named_parameters()}
            self.fused = {name: torch.nn.Parameter(torch.full(s, torch.nan)) for name, s in self.shapes.items()}

        def named_parameters(self, *args: Any, **options: Any) -> Any:
            return iter(self.fused.items())

        def get_submodule(self, target: str) -> Any:
            return [SimpleNamespace(layer_number=1)]

    fused = FusedNames()
    assert "decoder.layers.1.mlp.linear_fc1.layer_norm_weight" in fused.fused
    load_weights(fused, source, single_process)
    for name, parameter in local.named_parameters():
        assert torch.equal(parameter, fused.fused[checkpoint_name(name)]), name


def test_a_vocabulary_that_the_tokenizer_does_not_fill_or_overfills(tmp_path, single_process):
    source = save_tiny(tmp_path / "hf", "llama", tied=False)
    module = empty(source, single_process, vocabulary=VOCABULARY + 9)
    load_weights(module, source, single_process)
    weight = module.embedding.word_embeddings.weight
    assert weight.shape[0] == VOCABULARY + 9 and weight[VOCABULARY:].abs().sum() == 0 and weight[:VOCABULARY].all()
    with pytest.raises(ValueError, match=r"embedding\.word_embeddings\.weight has shape"):
        load_weights(empty(source, single_process, vocabulary=VOCABULARY - 20), source, single_process)


def test_a_module_of_another_shape_is_refused_by_name(tmp_path, single_process):
    source = save_tiny(tmp_path / "hf", "qwen2", tied=False)
    other = empty(source, single_process, ffn_hidden_size=100)
    with pytest.raises(ValueError, match=r"linear_fc1\.weight has shape \(192, 48\).* \(200, 48\)"):
        load_weights(other, source, single_process)
    with pytest.raises(ValueError, match=r"q_layernorm\.weight.* Qwen2ForCausalLM"):
        load_weights(empty(source, single_process, qk_norm=True), source, single_process)


def test_mbridge_agrees_on_tied_qwen2_both_ways(tmp_path, single_process):
    mbridge_qwen2 = pytest.importorskip("mbridge.models.qwen2", reason="mbridge is in the extra `dev`")
    from transformers import AutoConfig

    # With an index: of a single file it refuses to read a tensor that it asks for twice.
    source = save_tiny(tmp_path / "hf", "qwen2", tied=True, max_shard_size="60KB")
    ours, theirs = empty(source, single_process), empty(source, single_process)
    load_weights(ours, source, single_process)

    class LocalQwen2(mbridge_qwen2.Qwen2Bridge):
        """The bridge knows Transformer Engine's names; the local spec calls its norms by their own."""

        _ATTENTION_MAPPING: ClassVar = {
            **mbridge_qwen2.Qwen2Bridge._ATTENTION_MAPPING,
            "input_layernorm.weight": ["model.layers.{layer_number}.input_layernorm.weight"],
        }
        _MLP_MAPPING: ClassVar = {
            **mbridge_qwen2.Qwen2Bridge._MLP_MAPPING,
            "pre_mlp_layernorm.weight": ["model.layers.{layer_number}.post_attention_layernorm.weight"],
        }

        def _weight_name_mapping_mcore_to_hf(self, name: str) -> list[str]:
            if name.endswith(".input_layernorm.weight"):
                return self._weight_name_mapping_attention(name)
            if name.endswith(".pre_mlp_layernorm.weight"):
                return self._weight_name_mapping_mlp(name)
            return super()._weight_name_mapping_mcore_to_hf(name)

    config = AutoConfig.from_pretrained(source)
    config.rope_theta = 10000.0  # a field of transformers 4, which mbridge reads
    bridge = LocalQwen2(config, dtype=torch.float32)
    with torch.no_grad():
        bridge.load_weights([theirs], str(source))
    for (name, mine), (_, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.equal(mine, other), name
    exported = dict(bridge.export_weights([ours]))
    for name, tensor in tensors_of(source).items():
        assert torch.equal(exported[name], tensor), name
