"""Rendering of prompts: a question to the token ids that the model sees, and a response's ids to its text."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from datetime import datetime

import jinja2
from transformers import PreTrainedTokenizerBase

from oreal_megatron.config import PromptConfig
from oreal_megatron.extensions import prompt_function, source_of
from oreal_megatron.types import Prompt

_CLOCK = re.compile(r"\bstrftime_now\s*\(\s*(?:(['\"])(.*?)\1\s*\))?")
"""Call of the function by which chat templates show a date. The second group is the date's form where it is text."""


def has_clock(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Returns whether the chat template shows the time, so that the same messages give other tokens another day."""
    return _CLOCK.search(str(tokenizer.chat_template)) is not None


def _at_day(template: str, day: datetime) -> str:
    """Returns a chat template that shows a given day.

    Raises:
        ValueError: the form of its date is no text, so the day cannot be written into it.
    """

    def shown(call: re.Match[str]) -> str:
        if call[2] is None:
            raise ValueError(
                "prompt.date: the chat template of model.tokenizer calls strftime_now with something else than a text, "
                "so its day cannot be fixed. Write the form of the date into the template"
            )
        return json.dumps(day.strftime(call[2]))

    return _CLOCK.sub(shown, template)


_PLACEHOLDER = "content of the turn"


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
        self.check_rows([stop_token_id], f"prompt.stop_token = {config.stop_token!r}")
        self.stop_token_id = stop_token_id
        self.may_exceed_model = max(tokenizer.get_vocab().values()) >= vocab_size
        """Whether the tokenizer has token ids for which the model has no row."""
        self._own_messages = prompt_function(config)
        self._cache: dict[str, tuple[int, ...]] = {}
        self._template = tokenizer.get_chat_template()
        if config.date is not None:
            self._template = _at_day(self._template, datetime.fromisoformat(config.date))
        self._token_text = functools.cache(lambda token: str(tokenizer.decode([token])))

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hex digits that depend on everything that turns a text into token ids: tokenizer, template and prompt.

        Of `prompt.function` it is the source of its module.
        """
        tokenizer = self._tokenizer
        vocabulary = (
            tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else sorted(tokenizer.get_vocab().items())
        )
        config = self._config.model_dump(include={"system", "user", "stop_token", "date", "function"})
        parts = [str(vocabulary), str(tokenizer.chat_template), str(tokenizer.special_tokens_map), str(config)]
        if self._own_messages is not None:
            parts.append(source_of(self._own_messages))
        return hashlib.blake2b("\0".join([*parts, str(self._vocab_size)]).encode(), digest_size=8).hexdigest()

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
        return self.text_ids(self.question_text(question))

    def question_text(self, question: str) -> str:
        """Returns the whole prompt as text. Raises ValueError where the chat template refuses it."""
        try:
            return self.message_text(self._messages(question))
        except jinja2.TemplateError as error:
            remedy = "Set prompt.system=null, or choose another prompt"
            raise ValueError(f"the chat template of model.tokenizer refuses the prompt: {error}. {remedy}") from error

    def _messages(self, question: str) -> list[dict[str, str]]:
        """Returns the messages of a question. Raises ValueError where prompt.function returned something else."""
        if self._own_messages is not None:
            messages = self._own_messages(question=question)
            if not (isinstance(messages, list) and messages and all(map(_is_message, messages))):
                assert self._config.function is not None
                raise ValueError(
                    f"prompt.function = {self._config.function.path} returned {messages!r:.200} for the question "
                    f"{question[:80]!r}; return a list of {{'role': ..., 'content': ...}} with texts"
                )
            return messages
        messages = [{"role": "user", "content": self._config.user.replace("{question}", question)}]
        if self._config.system is not None:
            messages.insert(0, {"role": "system", "content": self._config.system})
        return messages

    def between_turns(self, messages: Sequence[tuple[str, str]]) -> tuple[int, ...]:
        """Returns the token ids after a turn of the assistant and its stop token, up to where its next turn begins.

        messages: role and content of the messages between the two turns.

        Raises:
            ValueError: the chat template refuses the messages, or shows what is before the assistant's turn in another
                way because of them, or the model has no row for a token.
        """
        asked = self._messages("question")
        turn = {"role": "assistant", "content": _PLACEHOLDER}
        added = [{"role": role, "content": content} for role, content in messages]
        try:
            text = self.message_text([*asked, turn, *added])
            alone = self.message_text(asked, opens_turn=False)
        except jinja2.TemplateError as error:
            roles = " and ".join(sorted({repr(role) for role, _ in messages}))
            remedy = "Name another role, or append the text with its marks"
            raise ValueError(
                f"the chat template of model.tokenizer refuses messages of the role {roles} after the assistant's: "
                f"{error}. {remedy}"
            ) from error
        before, found, between = text.partition(_PLACEHOLDER + self._config.stop_token)
        if not found:
            raise ValueError(
                "the chat template of model.tokenizer does not end the assistant's turns with their content and "
                f"prompt.stop_token = {self._config.stop_token!r}; append the text between turns with its marks"
            )
        if not before.startswith(alone):
            raise ValueError(
                "the chat template of model.tokenizer shows the question in another way where messages follow it, and "
                "its tokens are in the prompt already; append the text between turns with its marks"
            )
        return self.text_ids(between)

    def text_ids(self, text: str) -> tuple[int, ...]:
        """Returns the token ids of a text; marks of the chat template in it become their tokens.

        Raises:
            ValueError: the model has no row for one of them.
        """
        return tuple(self.encode([text])[0])

    def message_text(self, messages: Sequence[dict[str, str]], *, opens_turn: bool = True) -> str:
        """Returns messages as text by the chat template.

        opens_turn: the text goes up to where the assistant's next turn begins.

        Raises:
            jinja2.TemplateError: the chat template refuses the messages.
        """
        text = self._tokenizer.apply_chat_template(
            list(messages), chat_template=self._template, tokenize=False, add_generation_prompt=opens_turn
        )
        return str(text)

    def encode(self, texts: Sequence[str], places: Sequence[str] = ()) -> list[list[int]]:
        """Returns the token ids of each text, by the tokenizer's own threads.

        places: file and number of the record of each text, for messages.

        Raises:
            ValueError: the model has no row for one of them.
        """
        if not texts:  # the tokenizer takes no empty list
            return []
        encoded: list[list[int]] = self._tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False
        )["input_ids"]
        if self.may_exceed_model:
            for text, ids, place in zip(texts, encoded, places or itertools.repeat(""), strict=False):
                shown = text if len(text) <= 200 else text[:197] + "..."
                self.check_rows(ids, f"{place}: the text {shown!r}" if place else f"the text {shown!r}")
        return encoded

    def response_ids(self, text: str) -> tuple[int, ...]:
        """Returns the token ids of a finished response, with the stop token.

        Raises:
            ValueError: the model has no row for one of them.
        """
        return (*self.encode([text])[0], self.stop_token_id)

    def check_rows(self, ids: Sequence[int], source: str) -> None:
        """Raises ValueError where the model has no row for a token id. source: the ids' origin, for the message."""
        if (lowest := min(ids, default=0)) < 0:
            raise ValueError(f"{source} has the token id {lowest}; ids are 0 or more")
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


def _is_message(message: object) -> bool:
    return (
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
    )
