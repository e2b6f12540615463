"""Rendering of prompts for a model whose embedding has a given number of rows."""

from __future__ import annotations

import pytest

from oreal_megatron.config import PromptConfig
from oreal_megatron.data.prompting import PromptRenderer
from oreal_megatron.data.tokenizer import arithmetic_tokenizer

TOKENIZER = arithmetic_tokenizer()
BOX = TOKENIZER.convert_tokens_to_ids("\\boxed{")


def renderer(vocab_size, stop_token="<|im_end|>"):
    config = PromptConfig(
        system=None, user="{question}", stop_token=stop_token, thinking_end_marks=(), max_prompt_tokens=64
    )
    return PromptRenderer(TOKENIZER, config, vocab_size=vocab_size)


def test_renderer_refuses_every_text_with_a_token_that_the_model_has_no_row_for():
    short, whole = renderer(BOX), renderer(BOX + 1)
    assert short.may_exceed_model and not whole.may_exceed_model
    assert short.question_ids("Compute 1+1.") == whole.question_ids("Compute 1+1.")
    assert whole.response_ids("\\boxed{2}") == (BOX, *short.response_ids("2}"))
    for render in (short.question_ids, short.response_ids):
        with pytest.raises(ValueError, match=f"with id {BOX}, and the model's embedding has {BOX} rows"):
            render("It is \\boxed{2}")


def test_renderer_refuses_a_stop_token_that_the_model_has_no_row_for():
    assert renderer(3).stop_token_id == 2
    with pytest.raises(ValueError, match=r"prompt\.stop_token = '<\|im_end\|>' has the token .* with id 2"):
        renderer(2)
