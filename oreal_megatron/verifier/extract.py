r"""The final answer of a response: the complete boxes after the thinking, or one explicit statement of the answer.

A response is hostile text of any length: everything here is linear in it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from oreal_megatron.verifier.latex.normalize import matching_brace

MAX_BOX_CHARS = 8_192
"""Length of the longest box that is read; a longer box is refused."""
MAX_BOXES = 64
"""Largest number of boxes in a final part; more are taken for a list of guesses."""
MAX_JOINER_CHARS = 80
MAX_STATEMENT_CHARS = 200
MAX_STATEMENT_SEARCH = 4_000
MAX_BARE_CHARS = 80


@dataclass(frozen=True)
class Extraction:
    """The answers that the final part of a response states."""

    answers: tuple[str, ...] = ()
    """The stated answer, or the parts of a list that share the last sentence."""
    earlier: tuple[str, ...] = ()
    """Boxes before the last sentence, which must not contradict it."""
    refusal: str | None = None
    """Reason why there is no answer to compare; None if there is one."""


_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])")
_BARE_BOX = re.compile(
    r"\s*(-?(?:\d[\d,]{0,40}(?:\.\d{1,40})?|[A-Za-z])"
    r"|\\[dt]?frac\s*(?:\d\s*\d|\{[^{}]{1,40}\}\s*\{[^{}]{1,40}\})|\\[A-Za-z]{1,20})"
)
_JOINER = re.compile(
    r"(?:\s|[$,;.&~]|\\[\[\]()!,;: ]|\\quad|\\qquad|\\text\s*\{\s*(?:and|or|,)?\s*\}|\\\\|and|or|[A-Za-z]\s*=){0,60}",
    re.IGNORECASE,
)
_CODE = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]{0,400}`|<!--.*?(?:-->|\Z)|\\begin\{verbatim\}.*?(?:\\end\{verbatim\}|\Z)", re.DOTALL
)
_HIDDEN = re.compile(r"\\[hv]?phantom\s*\{")
_STATEMENT = re.compile(
    r"(?:<answer>|\banswer\s+is|\bcorrect\s+(?:option|choice)\s+is|\banswer\W{0,3}\s*(?=[:：=])|\bfinal\s+answer\b(?!\s+is)|^####|最终答案|最后答案|答案)"
    r"\s*(?:是|为)?\s*(?:\*\*)?\s*[:：=]?\s*(?:\*\*)?\s*",
    re.IGNORECASE | re.MULTILINE,
)
_STATEMENT_END = re.compile(r"(?:</answer>|[.。!](?=\s|$)|[。\n])")


def final_part(response: str, thinking_end_marks: Sequence[str]) -> str | None:
    """Returns the text behind the last mark that ends thinking; None if the thinking began and never ended."""
    start = 0
    for mark in thinking_end_marks:
        found = response.rfind(mark)
        if found >= 0:
            start = max(start, found + len(mark))
    if start == 0 and response.lstrip().startswith("<think>"):
        return None
    return response[start:]


def _inside_quotes(text: str, start: int, end: int) -> bool:
    """Whether [start, end) stands between double quotation marks within its paragraph."""
    paragraph_start = text.rfind("\n\n", 0, start) + 1
    paragraph_end = text.find("\n\n", end)
    before = text[max(paragraph_start, start - 2_000) : start]
    after = text[end : min(paragraph_end if paragraph_end >= 0 else len(text), end + 2_000)]
    if before.count("“") > before.count("”") and "”" in after:
        return True
    if before.count("``") > before.count("''") and "''" in after:
        return True
    opening = before.rfind('"')
    # An inch sign follows a digit; an opening quotation mark does not follow a letter or digit.
    opens = opening == 0 or (opening > 0 and not before[opening - 1].isalnum())
    return opens and before.count('"') % 2 == 1 and '"' in after


def _boxes(text: str) -> tuple[list[tuple[int, int, str]], bool]:
    """Returns (start, end, content) of the complete outermost boxes, in order, and whether a box was left open."""
    found: list[tuple[int, int, str]] = []
    position = 0
    left_open = False
    while len(found) <= MAX_BOXES and (match := _BOX.search(text, position)):
        position = match.end()
        brace = re.compile(r"\s{0,20}\{").match(text, position)
        if brace is None:
            bare = _BARE_BOX.match(text, position)
            if bare:
                found.append((match.start(), bare.end(), bare[1]))
                position = bare.end()
            continue
        close = matching_brace(text, brace.end() - 1)
        if close < 0:
            left_open = True
            break
        found.append((match.start(), close + 1, text[brace.end() : close]))
        position = close + 1
    return found, left_open


def _is_bare(text: str) -> bool:
    """Whether a final part is a bare answer: one line of mathematics, or one word."""
    if len(text) > MAX_BARE_CHARS or "\n" in text:
        return False
    words = re.findall(r"[A-Za-z]{2,}", re.sub(r"\\text\s*\{[^{}]*\}|\\[A-Za-z]+", " ", text))
    return not words or re.fullmatch(r"[A-Za-z]+\.?", text) is not None


def _stated_answer(text: str) -> str | None:
    """Returns the answer of the last explicit statement without a box ("The answer is 7."), or None."""
    end_of_text = text[-MAX_STATEMENT_SEARCH:]
    statements = list(_STATEMENT.finditer(end_of_text))
    if not statements:
        return text.strip() if _is_bare(text.strip()) else None
    rest = end_of_text[statements[-1].end() :].strip()
    end = _STATEMENT_END.search(rest)
    stated = (rest[: end.start()] if end else rest).strip().strip("*").strip()
    stated = re.split(r"\b(?:is|are|equals)\s", stated)[-1].strip()  # "the largest n is 34"
    return stated if 0 < len(stated) <= MAX_STATEMENT_CHARS else None


def _joined(text: str, start: int, end: int) -> bool:
    """Whether only a comma, "and" or the like stands between two boxes."""
    return end - start <= MAX_JOINER_CHARS and _JOINER.fullmatch(text, start, end) is not None


def extract(response: str, thinking_end_marks: Sequence[str]) -> Extraction:
    """Extracts the final answer of a response that stopped."""
    final = final_part(response, thinking_end_marks)
    if final is None:
        return Extraction(refusal="the thinking part never ends, so there is no final part")
    if not final.strip():
        return Extraction(refusal="nothing follows the thinking part")
    visible = _CODE.sub(" ", final)
    boxes, left_open = _boxes(visible)
    if left_open:
        return Extraction(refusal="the last box is not closed")
    if len(boxes) > MAX_BOXES:
        return Extraction(refusal=f"more than {MAX_BOXES} boxes")
    boxes = [box for box in boxes if not _inside_quotes(visible, box[0], box[1])]
    if not boxes:
        if "\\boxed" in final:
            return Extraction(refusal="the only box is inside a quotation or code")
        stated = _stated_answer(visible)
        if stated is None:
            return Extraction(refusal="no boxed answer and no explicit statement of one")
        return Extraction(answers=(stated,))
    if any(_HIDDEN.search(visible, max(0, start - 30), start) for start, _, _ in boxes):
        return Extraction(refusal="a box is hidden in a phantom")
    first = len(boxes) - 1
    while first > 0 and _joined(visible, boxes[first - 1][1], boxes[first][0]):
        first -= 1
    answers = tuple(content for _, _, content in boxes[first:])
    if any(not answer.strip() for answer in answers):
        return Extraction(refusal="the box is empty")
    if any(len(content) > MAX_BOX_CHARS for _, _, content in boxes):
        return Extraction(refusal=f"a box holds more than {MAX_BOX_CHARS} characters")
    return Extraction(answers=answers, earlier=tuple(content for _, _, content in boxes[:first]))
