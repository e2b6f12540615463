"""The rules stage: decides whether two final answers are equal. Pure; workers and the trainer run the same code."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

from oreal_megatron.types import Verdict
from oreal_megatron.verifier.equality.compare import AnswerComparison
from oreal_megatron.verifier.equality.leaves import Leaves, NeedsSympy
from oreal_megatron.verifier.equality.letters import choice_outcome, labelled_choice
from oreal_megatron.verifier.extract import gold_value
from oreal_megatron.verifier.input_limits import Refused, check_answer, is_hedged, looks_like_code
from oreal_megatron.verifier.latex.nodes import Leaf
from oreal_megatron.verifier.latex.normalize import normalize, text_key
from oreal_megatron.verifier.latex.notation import usual_number, without_excluded_points
from oreal_megatron.verifier.latex.rational import parse_rational
from oreal_megatron.verifier.latex.structure import parse
from oreal_megatron.verifier.latex.units_and_words import numbers_in_prose
from oreal_megatron.verifier.outcome import Outcome, different, equal, rejected, unknown

MAX_ANSWER_CHARS = 8_192


_INTEGER_PARAMETER = re.compile(
    r"(?:,|;|\\text\s*\{\s*,?\s*(?:where|with|for|and)?[^{}]{0,20}\}|where|\()?\s*(?<![A-Za-z\\])([a-zA-Z])\s*"
    r"(?:\\in\s*\\mathbb\s*\{?\s*(?P<set>[ZN])\s*\}?(?:\s*[_^]\s*\{?[\w+*]\}?)?"
    r"|(?:\\text\s*\{)?\s*(?:is\s+)?(?:an|any)\s+(?:arbitrary\s+)?integer\s*\}?)\s*\)?"
)
_PARAMETERS = {"Z": "kappa", "N": "iota"}
_SENTENCE_WORDS = 6
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")


def has_words_of_a_sentence(gold: str) -> bool:
    """Whether a gold answer has so many words that rules cannot compare it with an answer that is put otherwise."""
    return len(_WORD.findall(gold)) >= _SENTENCE_WORDS


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


_CHOOSE_CALL = re.compile(r"(?:(?<![A-Za-z\\])C|\\text\s*\{\s*C\s*\})\s*\(\s*([\w+-]{1,8})\s*,\s*([\w+-]{1,8})\s*\)")
_PERMUTE_CALL = re.compile(
    r"[PA]\s*(?:\(\s*(\d{1,4})\s*,\s*(\d{1,4})\s*\)|_\s*(?:\{(\d{1,4})\}|(\d))\s*\^\s*(?:\{(\d{1,4})\}|(\d)))"
)
_INTEGER_NAME = r"(?:\\kappa|[kmntj])"
_LINEAR_IN_INTEGER = re.compile(
    rf"([a-z])\s*=\s*(?:(\d*)\s*{_INTEGER_NAME}\s*(?:([+-])\s*(\d+))?|(-?)\s*(\d+)\s*\+\s*(\d*)\s*{_INTEGER_NAME})"
    r"\s*(?:\\text\s*\{\s*\})?"
)


def _with_binomials(text: str, other: str) -> str:
    r"""Rewrites `C(10,3)` to `\binom{10}{3}`, unless the other answer has several parts, as a point C has."""
    if "," in other:
        return text
    if match := _PERMUTE_CALL.fullmatch(text):
        total, chosen = match[1] or match[3] or match[4], match[2] or match[5] or match[6]
        return rf"\binom{{{total}}}{{{chosen}}}\cdot {chosen}!"
    return _CHOOSE_CALL.sub(r"\\binom{\1}{\2}", text)


def _as_congruence(text: str, other: str) -> str:
    r"""Rewrites `n=3\kappa+1` to `n\equiv 1\pmod{3}`, if the other answer is a congruence."""
    match = _LINEAR_IN_INTEGER.fullmatch(text) if "\\equiv" in other else None
    if match is None:
        return text
    modulus = match[2] or match[7] or "1"
    residue = f"{(match[3] or '').replace('+', '')}{match[4] or '0'}" if match[6] is None else f"{match[5]}{match[6]}"
    return rf"{match[1]}\equiv {residue}\pmod{{{modulus}}}"


def _refused(gold: str, answer: str) -> Outcome | None:
    """Returns an outcome for texts that need no comparison: no answer, hostile text, hedges. Both are normalised."""
    if is_hedged(answer) and not is_hedged(gold):
        return rejected("the answer hedges or addresses the grader")
    if not re.search(r"\w|\\[A-Za-z]|\\\{\s*\\\}", answer) or re.fullmatch(r"(?:\\ldots|[?.\s])*", answer):
        return rejected("nothing that could be an answer")
    try:
        check_answer(gold)
        check_answer(answer)
    except Refused as refusal:
        reason = f"refused: {refusal}"
        return unknown(reason) if parse_rational(gold) is None else different(f"{reason}, for a plain number")
    return None


def compare_answers(gold: str, answer: str, leaves: Leaves) -> Outcome:
    """Returns whether `answer` is the gold answer. Raises NeedsSympy if the leaves do, and nothing else."""
    gold = gold_value(gold)
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
    answer_text = usual_number(answer_text, gold_text)
    if isinstance(labelled := labelled_choice(gold_text, answer_text), Outcome):
        return labelled
    gold_text = labelled or gold_text
    if text_key(gold_text) == text_key(answer_text):
        return equal("the same text")
    outcome = _refused(gold_text, answer_text) or choice_outcome(gold_text, answer_text)
    if outcome is not None:
        return outcome
    gold_text, answer_text = _with_binomials(gold_text, answer_text), _with_binomials(answer_text, gold_text)
    gold_named, answer_named = name_parameter(gold_text), name_parameter(answer_text)
    gold_named, answer_named = _as_congruence(gold_named, answer_named), _as_congruence(answer_named, gold_named)
    outcome = AnswerComparison(leaves).compare(parse(gold_named), parse(answer_named))
    if outcome.verdict is Verdict.INCORRECT and (bare := without_excluded_points(answer_text)) != answer_text:
        outcome = AnswerComparison(leaves).compare(parse(without_excluded_points(gold_text)), parse(bare))
    if outcome.verdict is Verdict.CORRECT:
        return outcome
    return _against_prose(gold_text, _value_of(gold_text), _value_of(answer_text), outcome)


def _value_of(text: str) -> Fraction | None:
    node = parse(text)
    return node.value if isinstance(node, Leaf) else None


def _against_prose(gold: str, gold_value: Fraction | None, value: Fraction | None, outcome: Outcome) -> Outcome:
    """Returns the outcome for a gold answer in words: INCORRECT for a number that differs from all that it states."""
    stated = numbers_in_prose(gold) if value is not None and gold_value is None else []
    is_sentence = has_words_of_a_sentence(gold)
    is_this_number = stated == [value] and (len(_WORD.findall(gold)) > 1 or "approx" in gold)
    if is_sentence and stated and value not in stated:
        return different("a number that the gold answer does not state")
    if outcome.verdict is Verdict.INCORRECT and (is_sentence or is_this_number):
        return unknown("the gold answer is a sentence, which rules cannot compare")
    return outcome


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
    parts = getattr(parse(normalize(gold_value(gold))), "parts", ())
    node = parse(normalize(box))
    return any(AnswerComparison(leaves).compare(part, node).verdict is Verdict.CORRECT for part in parts)
