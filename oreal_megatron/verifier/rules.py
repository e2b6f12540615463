"""The rules stage: decides whether two final answers are equal. Pure; workers and the trainer run the same code."""

from __future__ import annotations

import re
from collections.abc import Sequence

from oreal_megatron.types import Verdict
from oreal_megatron.verifier.equality.compare import AnswerComparison
from oreal_megatron.verifier.equality.leaves import Leaves, NeedsSympy
from oreal_megatron.verifier.input_limits import Refused, check_answer, is_hedged, looks_like_code
from oreal_megatron.verifier.latex.normalize import normalize, text_key
from oreal_megatron.verifier.latex.notation import without_excluded_points
from oreal_megatron.verifier.latex.structure import parse
from oreal_megatron.verifier.outcome import Outcome, different, equal, rejected, unknown

MAX_ANSWER_CHARS = 8_192


_INTEGER_PARAMETER = re.compile(
    r"(?:,|;|\\text\s*\{\s*,?\s*(?:where|with|for|and)?[^{}]{0,20}\}|where|\()?\s*(?<![A-Za-z\\])([a-zA-Z])\s*"
    r"(?:\\in\s*\\mathbb\s*\{?\s*(?P<set>[ZN])\s*\}?(?:\s*[_^]\s*\{?[\w+*]\}?)?"
    r"|(?:\\text\s*\{)?\s*(?:is\s+)?(?:an|any)\s+(?:arbitrary\s+)?integer\s*\}?)\s*\)?"
)
_PARAMETERS = {"Z": "kappa", "N": "iota"}
_SENTENCE_WORDS = 6


def name_parameter(text: str) -> str:
    r"""Rewrites `x=n\pi, n\in\mathbb{Z}` to `x=\kappa\pi`, since the letter of a declared integer is free."""
    declared = _INTEGER_PARAMETER.search(text)
    if declared is None:
        return text
    rest = text[: declared.start()] + text[declared.end() :]
    if not rest.strip():
        return text
    letter = declared[1]
    parameter = _PARAMETERS[declared["set"] or "Z"]
    return re.sub(rf"(?<![A-Za-z\\]){letter}(?![A-Za-z])", lambda _: f"\\{parameter} ", rest).strip(" ,")


_CHOICE = re.compile(r"\(?\s*([A-Z])\s*\)?\s*[.:]?")
_CHOICE_OF_TEXT = re.compile(r"(?:\(\s*([A-H])\s*\)|([A-H])\s*[.:)])\s*([^\s,;].*)", re.DOTALL)
_ANOTHER_CHOICE = re.compile(r"\(\s*[A-H]\s*\)|(?<![A-Za-z])[A-H]\s*[.:)]|\b(?:or|and)\s+[A-H]\b")
_LETTERS = re.compile(r"[A-H](?:\s*,?\s*(?:and)?\s*[A-H]){0,7}")


def _choices(text: str) -> frozenset[str] | None:
    plain = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", text).strip()
    plain = re.sub(r"(?i)^(?:option|choice|answer)\s*:?\s+", "", plain)
    if match := _CHOICE.fullmatch(plain):
        return frozenset(match[1])
    if _LETTERS.fullmatch(plain):
        letters = re.findall("[A-H]", plain)
        return frozenset(letters) if len(set(letters)) == len(letters) else None
    return None


def _choice_outcome(gold: str, answer: str) -> Outcome | None:
    """Compares choices, if the gold answer is a letter or several letters."""
    wanted = _choices(gold)
    if wanted is None:
        return None
    given = _choices(answer)
    if given is None and (match := _CHOICE_OF_TEXT.fullmatch(re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", answer))):
        given = None if _ANOTHER_CHOICE.search(match[3]) else frozenset(match[1] or match[2])
    if given == wanted:
        return equal("the same choice")
    return different("another choice") if given is not None else None


def _refused(gold: str, answer: str) -> Outcome | None:
    """Returns an outcome for texts that need no comparison: no answer, hostile text, hedges. Both are normalised."""
    if is_hedged(answer) and not is_hedged(gold):
        return rejected("the answer hedges or addresses the grader")
    if not re.search(r"\w|\\[A-Za-z]|\\\{\s*\\\}", answer) or re.fullmatch(r"(?:\\ldots|[?.\s])*", answer):
        return rejected("nothing that could be an answer")
    try:
        check_answer(answer)
        check_answer(gold)
    except Refused as refusal:
        return unknown(f"refused: {refusal}")
    return None


def compare_answers(gold: str, answer: str, leaves: Leaves) -> Outcome:
    """Returns whether `answer` is the gold answer. Raises NeedsSympy if the leaves do, and nothing else."""
    if not gold.strip():
        return unknown("the gold answer is empty")
    if not answer.strip():
        return rejected("an empty answer")
    if looks_like_code(answer):
        return rejected("program text is no answer")
    if answer.strip() == gold.strip():
        return equal("the same text")
    if len(answer) > MAX_ANSWER_CHARS or len(gold) > MAX_ANSWER_CHARS:
        return (
            rejected("an answer of enormous length") if len(answer) > len(gold) else unknown("an enormous gold answer")
        )
    if max(len(gold), len(answer)) > leaves.max_chars:
        raise NeedsSympy  # normalisation is not linear in hostile text: a worker does it, which can be killed
    gold_text, answer_text = normalize(gold), normalize(answer)
    if text_key(gold_text) == text_key(answer_text):
        return equal("the same text")
    outcome = _refused(gold_text, answer_text) or _choice_outcome(gold_text, answer_text)
    if outcome is not None:
        return outcome
    outcome = AnswerComparison(leaves).compare(parse(name_parameter(gold_text)), parse(name_parameter(answer_text)))
    if outcome.verdict is Verdict.INCORRECT and (bare := without_excluded_points(answer_text)) != answer_text:
        outcome = AnswerComparison(leaves).compare(parse(without_excluded_points(gold_text)), parse(bare))
    if outcome.verdict is Verdict.INCORRECT and _is_sentence(gold_text):
        return unknown("the gold answer is a sentence, which rules cannot compare")
    return outcome


def _is_sentence(text: str) -> bool:
    return len(re.findall(r"(?<![\\A-Za-z])[A-Za-z]{2,}", text)) >= _SENTENCE_WORDS


def compare_final(gold: str, answers: Sequence[str], earlier: Sequence[str], leaves: Leaves) -> Outcome:
    """Returns whether the boxes of a final part state the gold answer, and no box contradicts it."""
    distinct = list(dict.fromkeys(answers))
    outcome = compare_answers(gold, ", ".join(distinct), leaves)
    others = [box for box in dict.fromkeys(earlier) if box not in distinct]
    if not others:
        return outcome
    if outcome.verdict is Verdict.CORRECT:
        agreeing = (_agrees(gold, box, leaves) for box in others)
        if all(agreeing):
            return outcome
        return rejected("the final part boxes different answers")
    # The parts of one answer may be boxed one by one, each in its own sentence.
    together = compare_answers(gold, ", ".join([*others, *distinct]), leaves)
    return together if together.verdict is Verdict.CORRECT else outcome


def _agrees(gold: str, box: str, leaves: Leaves) -> bool:
    """Whether an earlier box is the gold answer or one of its parts."""
    if compare_answers(gold, box, leaves).verdict is Verdict.CORRECT:
        return True
    parts = getattr(parse(normalize(gold)), "parts", ())
    node = parse(normalize(box))
    return any(AnswerComparison(leaves).compare(part, node).verdict is Verdict.CORRECT for part in parts)
