"""Assets of an export: they describe the model as it was trained, not the model.path that it started from."""

from __future__ import annotations

import json

import pytest
from transformers import AutoTokenizer, GenerationConfig

from oreal_megatron.checkpoint.export import write_assets
from oreal_megatron.conversion.huggingface import read_model
from oreal_megatron.data.tokenizer import arithmetic_tokenizer
from tests.tiny_models import GEOMETRY, MODEL, VOCABULARY, save_tiny

QUESTION = [{"role": "user", "content": "Compute 1+2"}]


@pytest.fixture
def source(tmp_path):
    """A published base model: it ends with <|endoftext|> = 0, has sampling defaults, and its own tokenizer."""
    directory = save_tiny(tmp_path / "source", "qwen2", tied=False)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "eos_token_id": 0}))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 7], "top_p": 0.9}))
    tokenizer = arithmetic_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }} in the base model's template"
    tokenizer.save_pretrained(directory)
    (directory / "vocab.json").write_text("{}")  # a file of the base model's tokenizer that the run's does not have
    return directory


def assets_of(tmp_path, path, tokenizer_path, tokenizer):
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model = MODEL.model_copy(update={"path": path and str(path), "tokenizer": str(tokenizer_path)})
    geometry = read_model(path).geometry if path else GEOMETRY.model_copy(update={"vocab_size": VOCABULARY})
    write_assets(tmp_path / "run", geometry, model, tokenizer, stop_token_id=stop)
    return tmp_path / "run/huggingface/assets", stop


def test_export_ends_at_the_trained_stop_token_and_the_source_s_end_tokens(tmp_path, source):
    tokenizer = AutoTokenizer.from_pretrained(source)
    assets, stop = assets_of(tmp_path, source, source, tokenizer)
    assert stop == 2
    generation = GenerationConfig.from_pretrained(assets)
    assert generation.eos_token_id == [2, 0, 7] and generation.top_p == 0.9
    assert json.loads((assets / "config.json").read_text())["eos_token_id"] == [2, 0, 7]
    for name in ("tokenizer.json", "chat_template.jinja", "vocab.json"):
        assert (assets / name).read_bytes() == (source / name).read_bytes()


def test_export_has_the_tokenizer_and_template_of_the_run_s_prompts(tmp_path, source):
    tokenizer = arithmetic_tokenizer()
    tokenizer.add_tokens(["a token of the run"])
    assets, _ = assets_of(tmp_path, source, "another", tokenizer)
    exported = AutoTokenizer.from_pretrained(assets)
    assert exported.chat_template == tokenizer.chat_template
    assert exported.apply_chat_template(QUESTION, tokenize=False) == tokenizer.apply_chat_template(
        QUESTION, tokenize=False
    )
    assert exported.get_vocab() == tokenizer.get_vocab()
    assert not (assets / "vocab.json").exists()
    assert GenerationConfig.from_pretrained(assets).top_p == 0.9


def test_export_of_a_model_from_scratch_ends_at_its_stop_token(tmp_path):
    assets, stop = assets_of(tmp_path, None, "arithmetic", arithmetic_tokenizer())
    for name in ("config.json", "generation_config.json"):
        assert json.loads((assets / name).read_text())["eos_token_id"] == stop
    assert AutoTokenizer.from_pretrained(assets).chat_template
