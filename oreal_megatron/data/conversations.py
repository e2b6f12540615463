"""Conversations of supervised fine-tuning: records as token ids, with a mask of the tokens that are trained.

The tokens before a trained turn are those that generation would begin from: the chat template of all messages before
it, with the opening of the assistant's turn. The turn's own tokens are its content and the stop token. So the mask is
exact for every template, and training sees what generation sees.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import numpy as np

from oreal_megatron.data.curation.text import question_key
from oreal_megatron.data.packing import PackedSequence
from oreal_megatron.data.prompting import PromptRenderer
from oreal_megatron.data.records import text_at

_ROLES = ("system", "user", "assistant", "tool")
_KEYS = ("role", "content", "weight", "name")
_WANTED = ("question", "response")


@dataclass(frozen=True)
class Turn:
    """A turn of the assistant that is trained."""

    prompt: str
    """Text that generation of the turn would begin from."""
    content: str


@dataclass(frozen=True)
class Rendered:
    """A record as text."""

    where: str
    """File and number of the record."""
    turns: tuple[Turn, ...]

    @property
    def key(self) -> bytes:
        """16 bytes that are equal for records whose first prompts differ in case, punctuation and layout alone."""
        return question_key(self.turns[0].prompt)

    @property
    def num_characters(self) -> int:
        return sum(len(turn.prompt) + len(turn.content) for turn in self.turns)


def rendered(record: Any, where: str, renderer: PromptRenderer, *, turns: str) -> Rendered:
    """Renders a record by the chat template.

    where: file and number of the record, for messages and ids. turns: see sft.turns.

    Raises:
        ValueError: the record is no conversation, or the template refuses it.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"{where}: an object is expected, not {type(record).__name__}")
    if "messages" not in record:
        question = "prompt" if "prompt" in record and "question" not in record else "question"
        asked, answered = (text_at(record, key, where, wanted=_WANTED) for key in (question, "response"))
        if not asked.strip() or not answered.strip():
            raise ValueError(f"{where}: `{question}` or `response` is empty. Remove the record.")
        return of_question(asked, answered, where, renderer)
    if record.get("tools"):
        raise ValueError(f"{where}: `tools` would be lost. Describe them in a system message, and remove the key.")
    messages = _checked(record["messages"], where)
    found = []
    for index in _trained_turns(messages, turns, where):
        try:
            prompt = renderer.message_text(messages[:index])
        except jinja2.TemplateError as error:
            raise ValueError(
                f"{where}: the chat template of model.tokenizer refuses `messages` before turn {index + 1}: {error}. "
                "Change the messages, or remove the record."
            ) from error
        found.append(_turn(prompt, messages[index]["content"], where))
    return Rendered(where, tuple(found))


def of_question(question: str, response: str, where: str, renderer: PromptRenderer) -> Rendered:
    """Renders a question, as the section `prompt` says, with its response. Raises ValueError as `rendered`."""
    try:
        prompt = renderer.question_text(question)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return Rendered(where, (_turn(prompt, response, where),))


def _turn(prompt: str, content: str, where: str) -> Turn:
    if content.lstrip().startswith("<think>") and prompt.rstrip().endswith("<think>"):
        raise ValueError(
            f"{where}: the response begins with <think>, and so does the assistant's turn of the chat template, before "
            "it. Remove <think> from the response."
        )
    return Turn(prompt, content)


def encoded(records: Sequence[Rendered], renderer: PromptRenderer) -> list[list[PackedSequence]]:
    """Returns the sequences of each record. The texts of all records are encoded together.

    A record is one sequence, or several where the template changes what earlier turns look like.

    Raises:
        ValueError: the model's vocabulary has no row for a token of a record.
    """
    turns = [(record.where, turn) for record in records for turn in record.turns]
    places = [where for where, _ in turns]
    prompts = renderer.encode([turn.prompt for _, turn in turns], places)
    responses = renderer.encode([turn.content for _, turn in turns], places)
    start, sequences = 0, []
    for record in records:
        end = start + len(record.turns)
        sequences.append(_sequences(record.where, prompts[start:end], responses[start:end], renderer.stop_token_id))
        start = end
    return sequences


def _sequences(
    where: str, prompts: Sequence[list[int]], responses: Sequence[list[int]], stop_token_id: int
) -> list[PackedSequence]:
    """Returns the sequences of a record, by the token ids of its turns."""
    spans: list[tuple[list[int], list[int], list[bool]]] = []
    for prompt_ids, content_ids in zip(prompts, responses, strict=True):
        response_ids = [*content_ids, stop_token_id]
        if spans:
            first, ids, mask = spans[-1]
            before = [*first, *ids]
            if prompt_ids[: len(before)] == before:
                between = prompt_ids[len(before) :]
                ids += [*between, *response_ids]
                mask += [False] * len(between) + [True] * len(response_ids)
                continue
        spans.append((prompt_ids, response_ids, [True] * len(response_ids)))
    return [
        PackedSequence(
            id=where if len(spans) == 1 else f"{where} part {part}",
            prompt_ids=np.array(first, np.int32),
            response_ids=np.array(ids, np.int32),
            loss_mask=None if all(mask) else np.array(mask),
        )
        for part, (first, ids, mask) in enumerate(spans, start=1)
    ]


def _checked(messages: Any, where: str) -> list[dict[str, Any]]:
    """Returns messages with role and content. Raises ValueError where they are something else."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where}: `messages` is {_shown(messages)}. Give it a list of {{role, content}}.")
    for index, message in enumerate(messages):
        key = f"`messages[{index}]"
        if not isinstance(message, Mapping):
            raise ValueError(f"{where}: {key}` is {_shown(message)}. Give it role and content.")
        if message.get("role") not in _ROLES:
            role = _shown(message.get("role"))
            raise ValueError(f"{where}: {key}.role` is {role}. Set it to {', '.join(_ROLES)}.")
        content = message.get("content")
        if not isinstance(content, str) or (message["role"] == "assistant" and not content.strip()):
            raise ValueError(f"{where}: {key}.content` is {_shown(content)}. Give it a text, or remove the record.")
        if lost := [name for name in message if name not in _KEYS and message[name]]:
            raise ValueError(
                f"{where}: {key}` has {', '.join(map(repr, lost))}, which would be lost: a turn is its content. Put it "
                "into `content` in the form that the model shall write, or remove it."
            )
        if message.get("weight") not in (None, 0, 1):
            raise ValueError(f"{where}: {key}.weight` is {_shown(message['weight'])}. Set it to 0 or 1.")
    if messages[0]["role"] == "assistant":
        raise ValueError(f"{where}: `messages[0].role` is 'assistant', before any question. Remove this message.")
    return messages


def _trained_turns(messages: Sequence[dict[str, Any]], turns: str, where: str) -> list[int]:
    """Returns the indices of the messages that are trained. Raises ValueError where there are none."""
    chosen = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if turns == "last_assistant":
        chosen = chosen[-1:]
    chosen = [index for index in chosen if messages[index].get("weight") != 0]
    if not chosen:
        raise ValueError(f"{where}: `messages` has no turn of the assistant to train on. Remove the record.")
    return chosen


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."
