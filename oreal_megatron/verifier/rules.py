"""The rules stage: decides whether two final answers are equal. Pure; workers and the trainer run the same code."""

from __future__ import annotations

import re
from collections.abc import Sequence

from oreal_megatron.types import Verdict
from oreal_megatron.verifier.equality.compare import AnswerComparison
from oreal_megatron.verifier.equality.leaves import Leaves, NeedsSympy
from oreal_megatron.verifier.extract import gold_value
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
_CHOICE_OF_TEXT = re.compile(
    r"(?:\(\s*([A-H])\s*\)|([A-H])\s*[.:)])\s*(?!\\(?:cup|cap|in|to|times|cdot|setminus)(?![A-Za-z]))([^\s,;=^_+*/(-].*)",
    re.DOTALL,
)
_ANOTHER_CHOICE = re.compile(r"\(\s*[A-H]\s*\)|(?<![A-Za-z])[A-H]\s*[.:)]|\b(?:or|and)\s+[A-H]\b")
_LETTERS = re.compile(r"[A-H](?:\s*,?\s*(?:and)?\s*[A-H]){0,7}")


def _without_text_command(text: str) -> str:
    return re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", text).strip()


def _choices(text: str) -> tuple[str, bool] | None:
    """Returns the letters of an answer that consists of letters, and whether their order is free; else None.

    The order is free for several choices with separators in alphabetical order, such as `A, C`. Letters without
    separators, or in another order, are a sequence.
    """
    plain = re.sub(r"(?i)^(?:option|choice|answer)\s*:?\s+", "", _without_text_command(text))
    if match := _CHOICE.fullmatch(plain):
        return match[1], False
    letters = "".join(re.findall("[A-Z]", plain))
    if _LETTERS.fullmatch(plain) and letters != plain:
        if len(set(letters)) < len(letters):
            return None
        return letters, letters == "".join(sorted(letters))
    return (plain, False) if re.fullmatch("[A-Z]{2,20}", plain) else None


def _choice_outcome(gold: str, answer: str) -> Outcome | None:
    """Compares choices and sequences of letters, if the gold answer is one."""
    wanted, given = _choices(gold), _choices(answer)
    if wanted is None:
        return None
    letters, is_free = wanted
    if given is None:
        labelled = _CHOICE_OF_TEXT.fullmatch(_without_text_command(answer))
        if labelled is None or _ANOTHER_CHOICE.search(labelled[3]):
            is_same_letter = letters in "ABCDE" and re.fullmatch(rf"\(?\s*{letters.lower()}\s*\)?", answer) is not None
            return equal("the same choice in lower case") if len(letters) == 1 and is_same_letter else None
        given = (labelled[1] or labelled[2], False)
    if given[0] == letters or (is_free and sorted(given[0]) == sorted(letters)):
        return equal("the same choice")
    if sorted(given[0]) == sorted(letters):
        if len(letters) == 2 and "\\text" not in gold:
            return unknown("two letters in another order: choices, a product, or a sequence")
        return different("the same letters in another order")
    return (
        None
        if letters.isalpha() and len(letters) > 1 and not set(letters) <= set("ABCDEFGH")
        else different("another choice")
    )


def _labelled_choice(gold: str, answer: str) -> Outcome | str | None:
    r"""Compares a letter with a gold answer such as `(D) \frac{3}{4}`; else returns its value, if it has a letter."""
    labelled = _CHOICE_OF_TEXT.fullmatch(_without_text_command(gold))
    if labelled is None or _ANOTHER_CHOICE.search(labelled[3]):
        return None
    outcome = _choice_outcome(labelled[1] or labelled[2], answer)
    return outcome if outcome is not None else labelled[3]


_CHOOSE_CALL = re.compile(r"(?<![A-Za-z\\])C\s*\(\s*([\w+-]{1,8})\s*,\s*([\w+-]{1,8})\s*\)")
_LINEAR_IN_INTEGER = re.compile(
    r"([a-z])\s*=\s*(?:(\d*)\s*\\kappa\s*(?:([+-])\s*(\d+))?|(-?)\s*(\d+)\s*\+\s*(\d*)\s*\\kappa)\s*(?:\\text\s*\{\s*\})?"
)


def _with_binomials(text: str, other: str) -> str:
    r"""Rewrites `C(10,3)` to `\binom{10}{3}`, unless the other answer has several parts, as a point C has."""
    return text if "," in other else _CHOOSE_CALL.sub(r"\\binom{\1}{\2}", text)


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
        check_answer(answer)
        check_answer(gold)
    except Refused as refusal:
        return unknown(f"refused: {refusal}")
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
    if isinstance(labelled := _labelled_choice(gold_text, answer_text), Outcome):
        return labelled
    gold_text = labelled or gold_text
    if text_key(gold_text) == text_key(answer_text):
        return equal("the same text")
    outcome = _refused(gold_text, answer_text) or _choice_outcome(gold_text, answer_text)
    if outcome is not None:
        return outcome
    gold_text, answer_text = _with_binomials(gold_text, answer_text), _with_binomials(answer_text, gold_text)
    gold_named, answer_named = name_parameter(gold_text), name_parameter(answer_text)
    gold_named, answer_named = _as_congruence(gold_named, answer_named), _as_congruence(answer_named, gold_named)
    outcome = AnswerComparison(leaves).compare(parse(gold_named), parse(answer_named))
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
    parts = getattr(parse(normalize(gold_value(gold))), "parts", ())
    node = parse(normalize(box))
    return any(AnswerComparison(leaves).compare(part, node).verdict is Verdict.CORRECT for part in parts)
