"""Hugging Face -> Megatron -> Hugging Face, bit for bit, and what stands beside the weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from oreal_megatron.conversion import convert
from oreal_megatron.conversion.convert import compare, to_huggingface, to_megatron
from oreal_megatron.conversion.layout import Layout
from oreal_megatron.conversion.weights import INDEX
from tests.tiny_models import FAMILIES, save_tiny

LAYOUTS = {
    "one": Layout(),
    "tp2": Layout(tensor=2),
    "tp4pp2": Layout(tensor=4, pipeline=2),
    "pp2vpp2padded": Layout(pipeline=2, virtual=2, vocabulary_multiple=64),
    "tp2pp2vpp2padded": Layout(tensor=2, pipeline=2, virtual=2, vocabulary_multiple=32),
}


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in directory.glob("*.safetensors") for name, t in load_file(file).items()}


def assert_same_bits(one: Path, other: Path) -> None:
    a, b = tensors_of(one), tensors_of(other)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trips_are_exact(tmp_path, family, tied, dtype, layout):
    # 121 rows: no split and no multiple divides them.
    source = save_tiny(tmp_path / "hf", family, tied=tied, dtype=dtype, num_layers=4, vocabulary=121)
    to_megatron(source, tmp_path / "megatron", layout)
    assert compare(source, tmp_path / "megatron") == {}
    to_huggingface(tmp_path / "megatron", tmp_path / "back")
    assert_same_bits(source, tmp_path / "back")


@pytest.mark.parametrize("family", FAMILIES)
def test_reward_models_come_in_and_out(tmp_path, family):
    source = save_tiny(tmp_path / "hf", family, tied=False, head="scalar")
    assert "score.bias" in tensors_of(source)
    to_megatron(source, tmp_path / "megatron", Layout(tensor=2))
    to_huggingface(tmp_path / "megatron", tmp_path / "back")
    assert_same_bits(source, tmp_path / "back")

    from transformers import AutoModelForTokenClassification

    models = [AutoModelForTokenClassification.from_pretrained(tmp_path / name).eval() for name in ("hf", "back")]
    ids = torch.arange(30).view(2, 15)
    one, other = (model(ids).logits for model in models)
    assert one.shape == (2, 15, 1)
    torch.testing.assert_close(one, other)  # the same bits at other addresses: other kernels, other rounding


def test_fewer_query_groups_than_tensor_ranks(tmp_path):
    source = save_tiny(tmp_path / "hf", "llama", tied=False, num_groups=2)
    to_megatron(source, tmp_path / "megatron", Layout(tensor=4))
    to_huggingface(tmp_path / "megatron", tmp_path / "back")
    assert_same_bits(source, tmp_path / "back")


def test_shards_with_an_index_and_small_blocks_come_in_and_out(tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(convert, "FILE_BYTES", 30_000)
    monkeypatch.setattr(convert, "SHARD_BYTES", 50_000)
    source = save_tiny(tmp_path / "hf", "qwen2", tied=False, max_shard_size="40KB")
    assert len(list(source.glob("*.safetensors"))) > 3
    to_megatron(source, tmp_path / "megatron", Layout(tensor=2))
    assert len(list((tmp_path / "megatron").glob("__*.distcp"))) > 4
    to_huggingface(tmp_path / "megatron", tmp_path / "back")
    assert_same_bits(source, tmp_path / "back")
    index = json.loads((tmp_path / "back" / INDEX).read_text())
    assert len(set(index["weight_map"].values())) > 3
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors_of(source).values())

    from transformers import AutoModelForCausalLM

    ids = torch.arange(20).view(1, 20)
    one, other = (AutoModelForCausalLM.from_pretrained(tmp_path / name).eval() for name in ("hf", "back"))
    torch.testing.assert_close(one(ids).logits, other(ids).logits)


def test_files_beside_the_weights_are_carried_over_unchanged(tmp_path):
    source = save_tiny(tmp_path / "hf", "llama", tied=True)
    texts = {"tokenizer.json": "{}", "chat_template.jinja": "{{ é }}\r\n", "generation_config.json": '{"top_p":  0.9}'}
    for name, text in texts.items():
        (source / name).write_bytes(text.encode())
    (source / "pytorch_model.bin").write_bytes(b"old")
    to_megatron(source, tmp_path / "megatron", Layout())
    to_huggingface(tmp_path / "megatron", tmp_path / "back")
    for name in (*texts, "config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes(), name
    assert sorted(p.name for p in (tmp_path / "back").iterdir()) == sorted([*texts, "config.json", "model.safetensors"])


def test_special_values_keep_their_bits(tmp_path):
    from safetensors.torch import save_file

    source = save_tiny(tmp_path / "hf", "llama", tied=True)
    tensors = tensors_of(source)
    weight = tensors["model.layers.0.self_attn.k_proj.weight"].view(torch.int32)
    weight[0, :4] = torch.tensor([0x7FC00001, -0x7FFFFF, -0x80000000, 1])  # two NaNs with payloads, -0, a subnormal
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    to_megatron(source, tmp_path / "megatron", Layout(tensor=2))
    assert compare(source, tmp_path / "megatron") == {}
    to_huggingface(tmp_path / "megatron", tmp_path / "back")
    back = tensors_of(tmp_path / "back")["model.layers.0.self_attn.k_proj.weight"].view(torch.int32)
    assert torch.equal(back, weight)


def test_a_changed_bit_is_found_and_named(tmp_path):
    from safetensors.torch import save_file

    source = save_tiny(tmp_path / "hf", "qwen2", tied=False)
    to_megatron(source, tmp_path / "megatron", Layout(tensor=2, pipeline=2))
    tensors = tensors_of(source)
    tensors["model.layers.1.mlp.up_proj.weight"].view(torch.int32)[7, 3] ^= 1
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    ((name, difference),) = compare(source, tmp_path / "megatron").items()
    assert name == "decoder.layers.1.mlp.linear_fc1.weight"
    assert "up_proj" in difference and "1 elements" in difference


def test_tied_output_layer_that_is_equal_is_not_written_again(tmp_path):
    from safetensors.torch import save_file

    source = save_tiny(tmp_path / "hf", "llama", tied=True)
    tensors = tensors_of(source)
    more = {
        "lm_head.weight": tensors["model.embed_tokens.weight"].clone(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),  # a buffer that old checkpoints carry
    }
    save_file(tensors | more, source / "model.safetensors")
    to_megatron(source, tmp_path / "megatron", Layout())
    to_huggingface(tmp_path / "megatron", tmp_path / "back")
    assert tensors_of(tmp_path / "back").keys() == tensors.keys()


def test_half_precision_config_of_a_float32_export_says_float32(tmp_path):
    source = save_tiny(tmp_path / "hf", "llama", tied=True)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    to_megatron(source, tmp_path / "megatron", Layout())
    to_huggingface(tmp_path / "megatron", tmp_path / "back")
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert written.pop("dtype") == "float32" and written == {k: v for k, v in config.items() if k != "dtype"}
