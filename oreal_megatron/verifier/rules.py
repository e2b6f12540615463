"""The rules stage: one pair of final answers, equal or not. Pure; the same code in and out of a worker."""

from __future__ import annotations

import re

from oreal_megatron.verifier.compare import Comparison, Leaves
from oreal_megatron.verifier.guards import Refused, check_answer, is_hedged, looks_like_code
from oreal_megatron.verifier.normalize import normalize
from oreal_megatron.verifier.outcome import Outcome, different, equal, unknown
from oreal_megatron.verifier.rational import parse_rational
from oreal_megatron.verifier.structure import parse

MAX_RULE_CHARS = 8_192


class NeedsSympy(Exception):
    """The fast path met an expression that is not a plain number."""


class RationalLeaves:
    """Compares plain numbers exactly, and leaves the rest to a worker with sympy."""

    def equal(self, gold: str, answer: str) -> Outcome:
        if gold.replace(" ", "") == answer.replace(" ", ""):
            return equal("the same text")
        gold_value, answer_value = parse_rational(gold), parse_rational(answer)
        if gold_value is None or answer_value is None:
            raise NeedsSympy
        return equal("the same number") if gold_value == answer_value else different("different numbers")

    def proportional(self, gold: tuple[str, str], answer: tuple[str, str]) -> Outcome:
        raise NeedsSympy

    def real_value(self, latex: str) -> object:
        value = parse_rational(latex)
        if value is None:
            raise NeedsSympy
        return value


_CHOICE = re.compile(r"\(?\s*([A-Z])\s*\)?\s*[.:]?")
_CHOICE_OF_TEXT = re.compile(r"\(\s*([A-H])\s*\)\s*\S.*|([A-H])\s*[.:)]\s*\S.*", re.DOTALL)
_LETTERS = re.compile(r"[A-H](?:\s*(?:,|and)?\s*[A-H]){0,7}")


def _choices(text: str) -> frozenset[str] | None:
    plain = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", text).strip()
    if match := _CHOICE.fullmatch(plain):
        return frozenset(match[1])
    if _LETTERS.fullmatch(plain):
        letters = re.findall("[A-H]", plain)
        return frozenset(letters) if len(set(letters)) == len(letters) else None
    return None


def _choice_outcome(gold: str, answer: str) -> Outcome | None:
    """For a gold answer that is one letter or several."""
    wanted = _choices(gold)
    if wanted is None:
        return None
    given = _choices(answer)
    if given is None and (match := _CHOICE_OF_TEXT.fullmatch(re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", answer))):
        given = frozenset(match[1] or match[2])
    if given == wanted:
        return equal("the same choice")
    return different("another choice") if given is not None else None


def compare_answers(gold: str, answer: str, leaves: Leaves) -> Outcome:
    """Whether `answer` is the gold answer. Never raises for a bad answer, except NeedsSympy from the leaves."""
    if not answer.strip():
        return different("an empty answer")
    if looks_like_code(answer):
        return different("program text is no answer")
    if len(answer) > MAX_RULE_CHARS:
        return equal("the same text") if answer.strip() == gold.strip() else different("an answer of enormous length")
    gold_text, answer_text = normalize(gold), normalize(answer)
    if gold_text.replace(" ", "") == answer_text.replace(" ", ""):
        return equal("the same text")
    if is_hedged(answer_text) and not is_hedged(gold_text):
        return different("the answer hedges or addresses the grader")
    if not re.search(r"[0-9A-Za-z]|\\[A-Za-z]", answer_text) or re.fullmatch(r"(?:\\ldots|[?.\s])*", answer_text):
        return different("nothing that could be an answer")
    try:
        check_answer(answer_text)
        check_answer(gold_text)
    except Refused as refusal:
        return unknown(f"refused: {refusal}")
    choice = _choice_outcome(gold_text, answer_text)
    if choice is not None:
        return choice
    if parse_rational(gold_text) is not None and parse_rational(answer_text) is not None:
        same = parse_rational(gold_text) == parse_rational(answer_text)
        return equal("the same number") if same else different("different numbers")
    return Comparison(leaves).compare(parse(gold_text), parse(answer_text))
