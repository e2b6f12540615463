"""Rendering of prompts: a question to the token ids that the model sees, and a response's ids to its text."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jinja2
from transformers import PreTrainedTokenizerBase

from oreal_megatron.config import PromptConfig
from oreal_megatron.types import Prompt


class PromptRenderer:
    """Renders prompts with the tokenizer's chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: PromptConfig, *, vocab_size: int):
        """Makes a renderer for a model whose embedding has `vocab_size` rows.

        Raises:
            ValueError: the tokenizer has no such stop token, or no chat template, or the model has no row for the stop
                token.
        """
        self._tokenizer = tokenizer
        self._config = config
        self._vocab_size = vocab_size
        stop_token_id = tokenizer.convert_tokens_to_ids(config.stop_token)
        if not isinstance(stop_token_id, int) or stop_token_id == tokenizer.unk_token_id:
            raise ValueError(
                f"prompt.stop_token = {config.stop_token!r} is not one token of the model's tokenizer; name its "
                "end-of-turn token"
            )
        if tokenizer.chat_template is None:
            raise ValueError(
                "model.tokenizer has no chat template, with which prompts are rendered; name a tokenizer that has one"
            )
        self._check_rows([stop_token_id], f"prompt.stop_token = {config.stop_token!r}")
        self.stop_token_id = stop_token_id
        self.may_exceed_model = max(tokenizer.get_vocab().values()) >= vocab_size
        """Whether the tokenizer has token ids for which the model has no row."""
        self._cache: dict[str, tuple[int, ...]] = {}
        self._token_text = functools.cache(lambda token: str(tokenizer.decode([token])))

    def token_ids(self, prompt: Prompt) -> tuple[int, ...]:
        """Returns the token ids of a prompt. Raises ValueError where they exceed prompt.max_prompt_tokens."""
        if prompt.question not in self._cache:
            ids = self.question_ids(prompt.question)
            if len(ids) > self._config.max_prompt_tokens:
                raise ValueError(
                    f"prompt {prompt.id} has {len(ids)} tokens, prompt.max_prompt_tokens is "
                    f"{self._config.max_prompt_tokens}"
                )
            self._cache[prompt.question] = ids
        return self._cache[prompt.question]

    def question_ids(self, question: str) -> tuple[int, ...]:
        """Returns the token ids of the whole prompt, up to where the assistant begins.

        Raises:
            ValueError: the model has no row for one of them, or the chat template refuses them.
        """
        messages = [{"role": "user", "content": self._config.user.replace("{question}", question)}]
        if self._config.system is not None:
            messages.insert(0, {"role": "system", "content": self._config.system})
        try:
            return self.message_ids(messages)
        except jinja2.TemplateError as error:
            remedy = "Set prompt.system=null, or choose another prompt"
            raise ValueError(f"the chat template of model.tokenizer refuses the prompt: {error}. {remedy}") from error

    def message_ids(self, messages: Sequence[dict[str, str]]) -> tuple[int, ...]:
        """Returns the token ids of messages by the chat template, up to where the assistant's next turn begins.

        Raises:
            ValueError: the model has no row for one of them.
            jinja2.TemplateError: the chat template refuses the messages.
        """
        text = self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        return self._encoded(str(text))

    def response_ids(self, text: str) -> tuple[int, ...]:
        """Returns the token ids of a finished response, with the stop token.

        Raises:
            ValueError: the model has no row for one of them.
        """
        return (*self._encoded(text), self.stop_token_id)

    def _encoded(self, text: str) -> tuple[int, ...]:
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        self._check_rows(ids, f"the text {text if len(text) <= 200 else text[:197] + '...'!r}")
        return tuple(ids)

    def _check_rows(self, ids: Sequence[int], source: str) -> None:
        """Raises ValueError where the model has no row for a token id. source: the ids' origin, for the message."""
        if (highest := max(ids, default=0)) >= self._vocab_size:
            raise ValueError(
                f"{source} has the token {self._tokenizer.convert_ids_to_tokens(highest)!r} with id {highest}, and the "
                f"model's embedding has {self._vocab_size} rows: set model.tokenizer to the tokenizer that the model "
                "was trained with, or add rows to the model for the new tokens (transformers: resize_token_embeddings)"
            )

    def response_text(self, token_ids: Sequence[int]) -> str:
        """Returns the text of a response, without the stop token; other special tokens stay visible."""
        ids = list(token_ids)
        if ids and ids[-1] == self.stop_token_id:
            ids.pop()
        return str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        """Returns the text of each token by itself, for display."""
        return [self._token_text(token) for token in token_ids]

    def without_overlong(self, prompts: Sequence[Prompt]) -> tuple[list[Prompt], list[Prompt]]:
        """Returns (prompts that fit prompt.max_prompt_tokens, the other prompts)."""
        fits = {p.id: len(self.question_ids(p.question)) <= self._config.max_prompt_tokens for p in prompts}
        return [p for p in prompts if fits[p.id]], [p for p in prompts if not fits[p.id]]
