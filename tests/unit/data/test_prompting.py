"""Rendering of prompts for a model whose embedding has a given number of rows."""

from __future__ import annotations

import pytest

from oreal_megatron.config import PromptConfig
from oreal_megatron.data.prompting import PromptRenderer, has_clock
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


def test_template_with_a_clock_shows_the_day_of_the_configuration():
    template = (
        "{%- if strftime_now is defined %}{%- set date_string = strftime_now( '%d %b %Y' ) %}{%- endif %}"
        "{{ date_string }}\n" + TOKENIZER.chat_template
    )
    dated = arithmetic_tokenizer()
    dated.chat_template = template
    assert has_clock(dated) and not has_clock(TOKENIZER)
    renderers = [
        PromptRenderer(
            dated,
            PromptConfig(
                system=None, user="{question}", stop_token="<|im_end|>", thinking_end_marks=(), max_prompt_tokens=64,
                date=day,
            ),
            vocab_size=len(dated),
        )
        for day in ("2024-07-03", "2024-07-04", None)
    ]  # fmt: skip
    assert renderers[0].question_text("1+1?").startswith("03 Jul 2024\n<|im_start|>user")
    assert renderers[1].question_text("1+1?").startswith("04 Jul 2024\n")
    assert "Jul 2024" not in renderers[2].question_text("1+1?")
    assert len({renderer.fingerprint for renderer in renderers}) == 3
    dated.chat_template = "{% set form = '%Y' %}{{ strftime_now(form) }}"
    with pytest.raises(ValueError, match=r"prompt\.date: .*Write the form of the date into the template"):
        PromptRenderer(dated, renderers[0]._config, vocab_size=len(dated))
