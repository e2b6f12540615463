"""Conversations of supervised fine-tuning: records of files as token ids, with a mask of the tokens that are trained.

The tokens before a trained turn are those that generation would begin from: the chat template of all messages before
it, with the opening of the assistant's turn. The turn's own tokens are its content and the stop token. So the mask is
exact for every template, and training sees what generation sees.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from oreal_megatron.config import SftConfig
from oreal_megatron.data.curation.sources import find_files, num_records, read_source
from oreal_megatron.data.packing import PackedSequence
from oreal_megatron.data.prompting import PromptRenderer
from oreal_megatron.data.records import text_at

logger = logging.getLogger(__name__)

_ROLES = ("system", "user", "assistant", "tool")
_KEYS = ("role", "content", "weight", "name")
_WANTED = ("question", "response")

Progress = Callable[[str, int], Any]
"""(title, total) -> context of a progress bar with the method `advance`, such as Tracker.progress."""


def read_conversations(
    path: str,
    split: str | None,
    renderer: PromptRenderer,
    sft: SftConfig,
    *,
    max_tokens: int,
    progress: Progress,
    limit: int | None = None,
) -> Generator[None, None, list[PackedSequence]]:
    """Reads the records of a file or of a data set's directory, and yields after each; returns the sequences.

    max_tokens: most tokens of a sequence; sft.overlong says what becomes of longer ones. limit: most records.

    Raises:
        ValueError: a record is no conversation, or too long under `sft.overlong: refuse`, or there is none. The message
            names file and record.
    """
    files = find_files(Path(path), split)
    total = num_records(files) if limit is None else min(limit, num_records(files))
    found: list[PackedSequence] = []
    with progress(f"tokens of {Path(path).name}", total) as bar:
        for number, (where, record) in enumerate(itertools.islice(read_source(files), limit), start=1):
            found += conversation(record, where, renderer, turns=sft.turns)
            bar.advance(f"{len(found)} sequences" if number % 1000 == 0 else "")
            yield
    if not found:
        raise ValueError(
            f"{path}: no records in it. A record has messages, or question and response, or prompt and response."
        )
    return fitting(found, path, sft.overlong, max_tokens)


def conversation(record: Any, where: str, renderer: PromptRenderer, *, turns: str) -> list[PackedSequence]:
    """Returns the sequences of a record: one, or several where the template changes what earlier turns look like.

    where: file and number of the record, for messages and ids. turns: see sft.turns.

    Raises:
        ValueError: the record is no conversation, or the template or the model's vocabulary refuses it.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"{where}: an object is expected, not {type(record).__name__}")
    if "messages" not in record:
        question = "prompt" if "prompt" in record and "question" not in record else "question"
        asked, answered = (text_at(record, key, where, wanted=_WANTED) for key in (question, "response"))
        if not asked.strip() or not answered.strip():
            raise ValueError(f"{where}: `{question}` or `response` is empty. Remove the record.")
        return [of_question(asked, answered, where, renderer)]
    if record.get("tools"):
        raise ValueError(f"{where}: `tools` would be lost. Describe them in a system message, and remove the key.")
    messages = _checked(record["messages"], where)
    spans: list[tuple[tuple[int, ...], list[int], list[bool]]] = []
    for index in _trained_turns(messages, turns, where):
        try:
            prompt_ids = renderer.message_ids(messages[:index])
            response_ids = _response_ids(messages[index]["content"], prompt_ids, where, renderer)
        except jinja2.TemplateError as error:
            raise ValueError(
                f"{where}: the chat template of model.tokenizer refuses `messages` before turn {index + 1}: {error}. "
                "Change the messages, or remove the record."
            ) from error
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if spans:
            first, ids, mask = spans[-1]
            before = (*first, *ids)
            if prompt_ids[: len(before)] == before:
                between = prompt_ids[len(before) :]
                ids += [*between, *response_ids]
                mask += [False] * len(between) + [True] * len(response_ids)
                continue
        spans.append((prompt_ids, list(response_ids), [True] * len(response_ids)))
    return [
        PackedSequence(
            id=where if len(spans) == 1 else f"{where} part {part}",
            prompt_ids=np.array(first, np.int32),
            response_ids=np.array(ids, np.int32),
            loss_mask=None if all(mask) else np.array(mask),
        )
        for part, (first, ids, mask) in enumerate(spans, start=1)
    ]


def of_question(question: str, response: str, where: str, renderer: PromptRenderer) -> PackedSequence:
    """Returns the sequence of a question, rendered as the section `prompt` says, and its response.

    Raises:
        ValueError: the model has no row for a token.
    """
    try:
        prompt_ids = renderer.question_ids(question)
        response_ids = _response_ids(response, prompt_ids, where, renderer)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return PackedSequence(
        id=where, prompt_ids=np.array(prompt_ids, np.int32), response_ids=np.array(response_ids, np.int32)
    )


def _response_ids(content: str, prompt_ids: Sequence[int], where: str, renderer: PromptRenderer) -> tuple[int, ...]:
    """Returns the token ids of an assistant's turn, with the stop token."""
    if content.lstrip().startswith("<think>") and renderer.response_text(prompt_ids).rstrip().endswith("<think>"):
        raise ValueError(
            "the response begins with <think>, and so does the assistant's turn of the chat template, before it. "
            "Remove <think> from the response."
        )
    return renderer.response_ids(content)


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


def fitting(sequences: Sequence[PackedSequence], path: str, overlong: str, max_tokens: int) -> list[PackedSequence]:
    """Returns the sequences of at most `max_tokens` tokens, and those that `overlong` keeps; logs how many were longer.

    Raises:
        ValueError: `overlong` is refuse and a sequence is longer, or no sequence is left.
    """
    longer = [sequence for sequence in sequences if sequence.num_tokens > max_tokens]
    if not longer:
        return list(sequences)
    longest = max(sequence.num_tokens for sequence in longer)
    problem = (
        f"{path}: {len(longer)} of {len(sequences)} conversations have more tokens than model.max_sequence_length = "
        f"{max_tokens} (first: {longer[0].id}, longest: {longest})"
    )
    if overlong == "refuse":
        raise ValueError(
            f"{problem}. Set model.max_sequence_length={longest}, or sft.overlong=drop to leave them out, or "
            "sft.overlong=truncate to cut them off."
        )
    kept = list(_cut_off(sequences, max_tokens)) if overlong == "truncate" else []
    if overlong == "drop":
        kept = [sequence for sequence in sequences if sequence.num_tokens <= max_tokens]
    if not kept:
        raise ValueError(f"{problem}, and none is left. Set model.max_sequence_length={longest}.")
    dropped = len(sequences) - len(kept)
    cut = f"{len(longer) - dropped} are cut off, " if overlong == "truncate" else ""
    logger.warning("%s; %s%d are left out (sft.overlong = %s)", problem, cut, dropped, overlong)
    return kept


def _cut_off(sequences: Sequence[PackedSequence], max_tokens: int) -> Iterator[PackedSequence]:
    """Yields the sequences, cut off after `max_tokens` tokens; without those of which no trained token is left."""
    for sequence in sequences:
        length = max(max_tokens - len(sequence.prompt_ids), 0)
        mask = None if sequence.loss_mask is None else sequence.loss_mask[:length]
        cut = PackedSequence(
            id=sequence.id,
            prompt_ids=sequence.prompt_ids,
            response_ids=sequence.response_ids[:length],
            loss_mask=mask,
        )
        if cut.num_trained_tokens:
            yield cut
