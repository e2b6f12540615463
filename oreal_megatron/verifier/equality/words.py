"""Comparison of answers in words."""

from __future__ import annotations

import re
from fractions import Fraction

from oreal_megatron.verifier.latex.node_queries import latex_of, words_of
from oreal_megatron.verifier.latex.nodes import Leaf, Node, Text
from oreal_megatron.verifier.latex.units_and_words import COMPARATIVE, DENIAL, words_key
from oreal_megatron.verifier.outcome import Outcome, different, equal, unknown

_ITEM = re.compile(r"\\text\b|\w+")


def compare_words(gold: Node, answer: Node) -> Outcome:
    """Compares two answers, at least one of which is text."""
    keys = {words_key(latex_of(node) or "") for node in (gold, answer)}
    if len(keys) == 1 and re.search(r"[^\W\d_]{3,}", keys.pop()):
        return equal("the same words")
    if (outcome := _enumerations(latex_of(gold) or "", latex_of(answer) or "")) is not None:
        return outcome
    gold_words, answer_words = words_of(gold), words_of(answer)
    if gold_words is None:
        assert isinstance(answer, Text)
        return prose_for_value(gold, answer.words)
    if answer_words is None:
        return different("a value where the gold answer is words")
    gold_key, answer_key = words_key(gold_words), words_key(answer_words)
    if gold_key == answer_key and (len(gold_key) > 1 or gold_words.lower() == answer_words.lower()):
        return equal("the same words")
    if len(gold_key.split()) <= 3:
        return different("different words")
    return unknown("the gold answer is a sentence, which rules cannot compare")


def _enumerations(gold: str, answer: str) -> Outcome | None:
    """Compares enumerations of the same words: `Ann and Bob` is `Bob, Ann`, while a longer list may be an order."""
    items = [
        [item.lower() for item in _ITEM.findall(text) if item.lower() not in ("\\text", "and")]
        for text in (gold, answer)
    ]
    if len(items[0]) < 2 or sorted(items[0]) != sorted(items[1]):
        return None
    if items[0] == items[1] and "," in gold + answer:
        return equal("the same words in order")
    is_pair = len(items[0]) == 2 and re.search(r"\band\b", gold) is not None
    return equal("the same two words") if is_pair else unknown("the same words in another order")


def prose_for_value(gold: Node, words: str) -> Outcome:
    """Compares words with a gold answer that is a value."""
    numbers = re.findall(r"\d+(?:\.\d+)?", words)
    if COMPARATIVE.search(words) or DENIAL.search(words):
        return different("words that state something else than a value")
    if len(numbers) == 1 and isinstance(gold, Leaf) and gold.value == Fraction(numbers[0]):
        return unknown("a sentence around the gold value, which rules cannot judge")
    return different("words where the gold answer is a value")
