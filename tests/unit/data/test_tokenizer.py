"""Tokenizers of Hugging Face directories: the ids are those of the directory's tokenizer.json."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer

from oreal_megatron.data.tokenizer import arithmetic_tokenizer, load_tokenizer


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "llama", "mistral"])
def test_a_tokenizer_is_that_of_its_file_whatever_the_models_family(tmp_path, model_type):
    arithmetic_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": 105}))
    loaded = load_tokenizer(str(tmp_path))
    messages = [{"role": "user", "content": "Compute 3+7.\n"}]
    text = loaded.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == arithmetic_tokenizer().apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = loaded.encode(text, add_special_tokens=False)
    assert ids == Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    assert loaded.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) == text
    assert loaded.eos_token == "<|im_end|>"


def test_a_directory_without_a_tokenizer_is_refused_with_its_name(tmp_path):
    with pytest.raises(ValueError, match=f"model.tokenizer = {tmp_path}: no tokenizer could be loaded"):
        load_tokenizer(str(tmp_path))
