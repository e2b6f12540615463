"""Comparison of answers that are letters: choices, several choices, and sequences of letters."""

from __future__ import annotations

import re

from oreal_megatron.verifier.outcome import Outcome, different, equal, unknown

_CHOICE = re.compile(r"\(?\s*([A-Z])\s*\)?\s*[.:]?")
_CHOICE_OF_TEXT = re.compile(
    r"(?:\(\s*([A-H])\s*\)|([A-H])\s*[.:)])\s*(?!\\(?:cup|cap|in|to|times|cdot|setminus)(?![A-Za-z]))([^\s,;=^_+*/(-].*)",
    re.DOTALL,
)
_ANOTHER_CHOICE = re.compile(r"\(\s*[A-H]\s*\)|(?<![A-Za-z])[A-H]\s*[.:)]|\b(?:or|and)\s+[A-H]\b")
_LETTERS = re.compile(r"[A-H](?:\s*,?\s*(?:and)?\s*[A-H]){0,7}")
_SEQUENCE = re.compile(r"[A-Z](?:\s*,\s*(?:and\s+)?[A-Z]){1,20}")
_ORDERING = re.compile(r"[A-Z](?:\s*(?:<|>|\\(?:lt|gt|to|le|ge)(?![A-Za-z]))\s*[A-Z])+")


def _without_text_command(text: str) -> str:
    return re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", text).strip()


def _is_selection(letters: str) -> bool:
    """Whether two letters without separators are choices: in alphabetical order, and not the first two.

    AC leaves B out, so it selects from A, B, C. AB may be an order of both, and three letters are a word or an order.
    """
    return len(letters) == 2 and letters[0] < letters[1] <= "H" and letters != "AB"


def _choices(text: str) -> tuple[str, bool] | None:
    """Returns the letters of an answer that consists of letters, and whether their order is free; else None.

    The order is free for several choices with separators in alphabetical order, such as `A, C`, and for a selection
    without separators. All other letters are a sequence.
    """
    plain = re.sub(r"(?i)^(?:option|choice|answer)\s*:?\s+|\s+only$", "", _without_text_command(text))
    if match := _CHOICE.fullmatch(plain):
        return match[1], False
    plain = re.sub(r"\(\s*([A-H])\s*\)", r"\1", plain).removeprefix("\\{").removesuffix("\\}").strip()
    letters = "".join(re.findall("[A-Z]", plain))
    is_repeated = len(set(letters)) < len(letters)
    if _SEQUENCE.fullmatch(plain) and is_repeated:
        return letters, False  # T, F, T
    if _LETTERS.fullmatch(plain) and letters != plain:
        return None if is_repeated else (letters, letters == "".join(sorted(letters)))
    return (plain, _is_selection(plain)) if re.fullmatch("[A-Z]{2,20}", plain) else None


def choice_outcome(gold: str, answer: str) -> Outcome | None:
    """Compares choices and sequences of letters, if the gold answer is one of them."""
    wanted, given = _choices(gold), _choices(answer)
    if wanted is None:
        return None
    letters, is_free = wanted
    if given is None:
        return _letters_against_text(letters, answer)
    if given[0] == letters or (is_free and sorted(given[0]) == sorted(letters)):
        return equal("the same choice")
    if sorted(given[0]) == sorted(letters):
        if len(letters) == 2 and "\\text" not in gold and letters not in ("AB", "BA"):
            return unknown("two letters in another order: a segment, a product, or a sequence")
        return different("the same letters in another order")
    return None if len(letters) > 1 and not set(letters) <= set("ABCDEFGH") else different("another choice")


def _letters_against_text(letters: str, answer: str) -> Outcome | None:
    """Compares letters with an answer that is not letters alone, such as `(D) 0.75`, `d`, or a number."""
    plain = _without_text_command(answer)
    labelled = _CHOICE_OF_TEXT.fullmatch(plain)
    if labelled is not None and not _ANOTHER_CHOICE.search(labelled[3]):
        return equal("the same choice") if letters == (labelled[1] or labelled[2]) else different("another choice")
    if len(letters) == 1:
        is_same_letter = letters in "ABCDE" and re.fullmatch(rf"\(?\s*{letters.lower()}\s*\)?", answer) is not None
        return equal("the same choice in lower case") if is_same_letter else None
    if _ORDERING.fullmatch(plain) and letters in ("".join(re.findall("[A-Z]", plain[::step])) for step in (1, -1)):
        return unknown("an ordering, which may begin at either end")
    return None if re.search("[A-Z]", plain) else different("no letter where the gold answer is letters")


def labelled_choice(gold: str, answer: str) -> Outcome | str | None:
    r"""Compares a letter with a gold answer such as `(D) \frac{3}{4}`; else returns its value, if it has a letter."""
    labelled = _CHOICE_OF_TEXT.fullmatch(_without_text_command(gold))
    if labelled is None or _ANOTHER_CHOICE.search(labelled[3]):
        return None
    outcome = choice_outcome(labelled[1] or labelled[2], answer)
    return outcome if outcome is not None else labelled[3]
