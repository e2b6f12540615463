r"""The final answer of a response: the complete boxes after the thinking, or one explicit statement of the answer.

A response is hostile text of any length: everything here is linear in it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from oreal_megatron.verifier.latex.normalize import matching_brace
from oreal_megatron.verifier.latex.rational import parse_rational
from oreal_megatron.verifier.latex.units_and_words import parse_word_number
from oreal_megatron.verifier.surroundings import (
    alternatives_before,
    is_part_of_expression,
    later_values,
    with_suffix,
    withdraws,
)

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
    r"```.*?(?:```|\Z)|`[^`\n]{0,400}`|<!--.*?(?:-->|\Z)|\\begin\{verbatim\}.*?(?:\\end\{verbatim\}|\Z)"
    r"|\\verb(?P<verb>[|!+]).{0,400}?(?P=verb)|<(?P<struck>del|s|strike)>.{0,400}?</(?P=struck)>"
    r"|(?<![\w$\\=~])~~(?=[^\s~])[^\n~]{0,400}~~",
    re.DOTALL,
)
"""Text that is shown, or struck out, and not stated."""
_HIDDEN = re.compile(r"\\(?:[hv]?phantom|[bx]?cancel|sout|st)\s*\{")
_STATEMENT = re.compile(
    r"(?:<answer>|\banswer\s+is|\bcorrect\s+(?:option|choice)\s+is|\banswer\W{0,3}\s*(?=[:：=])|\bfinal\s+answer\b(?!\s+is)|^####|最终答案|最后答案|答案)"
    r"\s*(?:是|为)?\s*(?:\*\*)?\s*[:：=]?\s*(?:\*\*)?\s*",
    re.IGNORECASE | re.MULTILINE,
)
_STATEMENT_END = re.compile(r"(?:</answer>|[.。!](?=\s|$)|[。\n])")


_ANNOUNCED = re.compile(r"\banswer\W{0,3}(?:\s*is)?\W{0,6}\Z", re.IGNORECASE)
_MAX_CODE_BOX = 200


def _is_announced_box(inside: str, before: str) -> bool:
    """Whether quoted text is nothing but a box, and announced as the answer."""
    inside = inside.strip().strip("$ ")
    is_box = _BOX.match(inside) is not None and matching_brace(inside, inside.find("{")) == len(inside) - 1
    return is_box and len(inside) <= _MAX_CODE_BOX and _ANNOUNCED.search(before[-40:]) is not None


def _without_code(match: re.Match[str]) -> str:
    """Removes program text, except for code that is nothing but a box and that is announced as the answer."""
    inside = re.sub(r"^```\w*\n?|`|^\\verb.|(?<=\})[|!+]$", "", match[0])
    is_answer = _is_announced_box(inside, match.string[max(0, match.start() - 40) : match.start()])
    return f" {inside.strip().strip('$ ')} " if is_answer else " "


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


_QUOTES = (("“", "”"), ("``", "''"), ('"', '"'))


def _inside_quotes(text: str, start: int, end: int) -> bool:
    """Whether [start, end) stands between double quotation marks within its paragraph, other than as the answer."""
    paragraph_start = text.rfind("\n\n", 0, start) + 1
    paragraph_end = text.find("\n\n", end)
    before = text[max(paragraph_start, start - 2_000) : start]
    after = text[end : min(paragraph_end if paragraph_end >= 0 else len(text), end + 2_000)]
    for opening, closing in _QUOTES:
        if opening == closing:  # straight marks are paired within a line
            before, after = before[before.rfind("\n") + 1 :], after.partition("\n")[0]
            position = before.rfind(opening)
            # An inch sign follows a digit; an opening quotation mark does not follow a letter or digit.
            opens = position == 0 or (position > 0 and not before[position - 1].isalnum())
            is_quoted = opens and before.count(opening) % 2 == 1 and closing in after
        else:
            position = before.rfind(opening)
            is_quoted = before.count(opening) > before.count(closing) and closing in after
        if is_quoted:
            inside = before[position + len(opening) :] + text[start:end] + after.partition(closing)[0]
            return not _is_announced_box(inside, before[:position])
    return False


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


def _stated_answer(text: str) -> Extraction:
    """Extracts the answer of the last explicit statement without a box ("The answer is 7.")."""
    missing = Extraction(refusal="no boxed answer and no explicit statement of one")
    end_of_text = text[-MAX_STATEMENT_SEARCH:]
    statements = list(_STATEMENT.finditer(end_of_text))
    if not statements:
        return Extraction(answers=(text.strip(),)) if _is_bare(text.strip()) else missing
    rest = end_of_text[statements[-1].end() :].strip()
    end = _STATEMENT_END.search(rest)
    stated = (rest[: end.start()] if end else rest).strip().strip("*").strip()
    stated = re.split(r"\b(?:is|are|equals)\s", stated)[-1].strip()  # "the largest n is 34"
    if not 0 < len(stated) <= MAX_STATEMENT_CHARS:
        return missing
    if end is not None and withdraws(rest, end.start()):
        return Extraction(refusal="the text after the answer withdraws it")
    return Extraction(answers=(stated,), earlier=later_values(rest, end.start()) if end else ())


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
    visible = _CODE.sub(_without_code, final)
    boxes, left_open = _boxes(visible)
    if left_open:
        return Extraction(refusal="the last box is not closed")
    if len(boxes) > MAX_BOXES:
        return Extraction(refusal=f"more than {MAX_BOXES} boxes")
    boxes = [box for box in boxes if not _inside_quotes(visible, box[0], box[1])]
    if not boxes:
        if "\\boxed" in final:
            return Extraction(refusal="the only box is inside a quotation or code")
        return _stated_answer(visible)
    if any(_HIDDEN.search(visible, max(0, start - 30), start) for start, _, _ in boxes):
        return Extraction(refusal="a box is hidden in a phantom")
    first = len(boxes) - 1
    while first > 0 and _joined(visible, boxes[first - 1][1], boxes[first][0]):
        first -= 1
    (start, _, _), (_, end, _) = boxes[first], boxes[-1]
    if is_part_of_expression(visible, start, end):
        return Extraction(refusal="the box is only a part of an expression")
    if withdraws(visible, end):
        return Extraction(refusal="the text after the box withdraws it")
    answers = tuple(content for _, _, content in boxes[first:])
    if any(not answer.strip() for answer in answers):
        return Extraction(refusal="the box is empty")
    if any(len(content) > MAX_BOX_CHARS for _, _, content in boxes):
        return Extraction(refusal=f"a box holds more than {MAX_BOX_CHARS} characters")
    answers = (*answers[:-1], with_suffix(visible, end, answers[-1]))
    steps = 0 if _later_retracts(visible, boxes[:first], boxes[first][0]) else _num_steps(visible, boxes[: first + 1])
    others = (*alternatives_before(visible, start), *later_values(visible, end))
    earlier = (*(content for _, _, content in boxes[steps:first]), *others)
    return Extraction(answers=answers, earlier=(*_between_marks(response, final, thinking_end_marks), *earlier))


_STEP = re.compile(
    r"(?:^|\n|[.;,:]\s|\s)(?:\*{0,2}(?:step|part|case|question)\s*\(?\w{1,3}\)?"
    r"|\(\s*(?:[a-h]|[ivx]{1,4}|\d)\s*\))|(?:^|\n)\s*(?:[a-h]|[ivx]{1,4}|\d)[.)]\s",
    re.IGNORECASE,
)
_LAST_STEP = re.compile(r"\bstep\s*\(?\w{1,3}\)?[^\n]*\Z", re.IGNORECASE)
_NAMED = re.compile(r"(?<![\w\\])((?:[A-Za-z](?:_\{?\w{1,3}\}?)?\s*[-+*/]?\s*){1,6})=\s*\Z")
_CONCLUSION = re.compile(
    r"\b(?:(?:final |the )?answer|therefore|hence|thus|in total|altogether|finally|overall"
    r"|the (?:sum|total|product|difference|result))\b",
    re.IGNORECASE,
)
_CONCLUSION_FROM_NAMES = re.compile(rf"\bso\b|\\therefore|\\implies|\\Rightarrow|{_CONCLUSION.pattern}", re.IGNORECASE)
_SECOND_THOUGHT = re.compile(
    r"\b(?:wait|no(?=[,.:;!])|actually|oops|hmm+|sorry|mistake|correction|instead|either|alternatively|or)\b",
    re.IGNORECASE,
)


def _later_retracts(text: str, steps: Sequence[tuple[int, int, str]], end: int) -> bool:
    """Whether a second thought stands between earlier boxes and the last one."""
    return any(_SECOND_THOUGHT.search(text, step_end, end) for _, step_end, _ in steps[:1])


def _num_steps(text: str, boxes: Sequence[tuple[int, int, str]]) -> int:
    """Returns how many boxes before the last are steps to it: labelled ones, or values of other names.

    A conclusion must introduce the last box, or it is the last of the labelled steps.
    """
    *gaps, last = [text[boxes[i - 1][1] if i else 0 : box[0]] for i, box in enumerate(boxes)]
    is_concluded = _CONCLUSION.search(last) is not None and _STEP.search(last) is None
    if (is_concluded or _LAST_STEP.search(last)) and all(_STEP.search(gap) for gap in gaps):
        return len(gaps)
    names = [match[1].strip() if (match := _NAMED.search(gap[-80:])) else None for gap in (*gaps, last)]
    is_sum_of_names = _CONCLUSION_FROM_NAMES.search(last) is not None and names[-1] is not None and len(names[-1]) > 1
    return len(gaps) if is_sum_of_names and None not in names and len(set(names)) == len(names) else 0


def _between_marks(response: str, final: str, marks: Sequence[str]) -> tuple[str, ...]:
    """Returns the boxes after earlier occurrences of the mark that opens the final part.

    They are part of the visible answer, and must not contradict the final part. Text before the last occurrence of
    another mark is thinking.
    """
    end = len(response) - len(final)
    mark = next((mark for mark in marks if response.endswith(mark, 0, end)), None)
    if mark is None or (first := response.find(mark)) + len(mark) == end:
        return ()
    others = (
        response.rfind(other, 0, end) + len(other) for other in marks if other != mark and other in response[:end]
    )
    boxes, _ = _boxes(_CODE.sub(" ", response[max(first + len(mark), *others, 0) : end]))
    return tuple(content for _, _, content in boxes)


_GOLD_STATEMENT = re.compile(
    r"(?:[A-Za-z, ]{0,40}\b)?(?:(?:final|correct)?\s*answers?(?:\s+(?:is|are))?\s*[:=.]?\s*(?:is\s+)?"
    r"|(?:ans|solution|result|option|choice)(?:\s*[:=]|\s+is\b)\s*:?\s*)(?P<value>\S.*?)\s*\.?",
    re.IGNORECASE | re.DOTALL,
)
_GOLD_LIST = re.compile(r"\[\s*(['\"])(.*)\1\s*\]", re.DOTALL)
_GOLD_IN_WORDS = re.compile(r"(-?\d[\d,]*)\s*\(\s*([a-z][a-z\s-]*)\)", re.IGNORECASE)


@functools.lru_cache(maxsize=4_096)
def gold_value(gold: str) -> str:
    r"""Returns the answer in a gold answer of a data set, such as `#### 4`, `The answer is 4.`, `['4']`."""
    text = gold.strip()
    if len(text) > MAX_BOX_CHARS:
        return text
    text = re.sub(r"^<answer>(.*)</answer>$", r"\1", text, flags=re.DOTALL).strip()
    if "####" in text:
        text = text.rpartition("####")[2].strip()
    if _BOX.search(text):
        boxes, left_open = _boxes(text)
        if boxes and not left_open:
            first = len(boxes) - 1
            while first > 0 and _joined(text, boxes[first - 1][1], boxes[first][0]):
                first -= 1
            return ", ".join(content for _, _, content in boxes[first:])
    if match := _GOLD_LIST.fullmatch(text):
        return ", ".join(re.split(rf"{match[1]}\s*,\s*{match[1]}", match[2]))
    if len(text) <= MAX_STATEMENT_CHARS and (match := _GOLD_STATEMENT.fullmatch(text)):
        text = match["value"]
    if (match := _GOLD_IN_WORDS.fullmatch(text)) and parse_word_number(match[2]) == parse_rational(match[1]):
        return match[1]
    if len(text) > 4 and text.startswith("\\$") and text.endswith("\\$"):
        return text[2:-2]
    return text
