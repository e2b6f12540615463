r"""The text around the final box: operators and negations that change its value, corrections that replace it.

A sign, a factor, a relation or a negation outside of the box makes the box a part of an answer, not an answer.
"""

from __future__ import annotations

import re

_MAX_BEFORE_CHARS = 400
_MAX_AFTER_CHARS = 4_000
_MAX_VALUES = 64

_IDLE_BEFORE = re.compile(
    r"(?:\\(?:displaystyle|left|bf|mathbf|text|quad|qquad|color\s*\{\w{1,20}\})(?![A-Za-z])\s*\{?"
    r"|\\[,;:! ]|</?\w{1,20}>|\*\*)\s*\Z"
)
_WORDS_IN_FORMULA = re.compile(r"\\text\s*\{([^{}]*)\}\s*\Z")
_FORMULA_START = re.compile(r"(?:\$\$?|\\\(|\\\[)\s*\Z")
_OPERATOR_BEFORE = re.compile(
    r"(?:\\(?:cdot|times|pm|mp|div|leq?|leqslant|geq?|geqslant|neq?|lt|gt|not|sqrt|approx|log|ln|sin|cos|tan)"
    r"|(?<!\*)\*|[/^<>≤≥≠±×·÷√+\-−\d)}])\s*\{?\s*\Z"
)
_SIGN_BEFORE = re.compile(r"(?:^|[\s(=])[-−+±]\Z")
_NEGATION_BEFORE = re.compile(
    r"(?:\b(?:not|never|cannot be|neither|rather than|instead of|than|except|excluding|half of|twice|double|minus|"
    r"negative|plus|times|at least|at most|almost|nearly)|n't)(?:\s+(?:equal(?:\s+to)?|be|simply|just))?[\s:*]*\Z",
    re.IGNORECASE,
)
_OPERATOR_AFTER = re.compile(
    r"(?:[ \t]|\\[,;!])*(?:\}[ \t]*)?(?:\^\s*(?!\{?\s*\\circ)|!(?![\s$]*(?:\n|\Z))|<(?![/|\w])"
    r"|[>≤≥≠±×·÷]|[-−+/][ \t]*[\d\\]"
    r"|[+/*](?=[A-Za-z\d\\(])|\\(?:cdot|times|pm|div|pi|sqrt|frac|leq?|geq?|neq?|binom|lor|log)(?![A-Za-z])"
    r"|[A-Za-z0-9](?![A-Za-z]))"
)
_OPERATION_IN_WORDS = re.compile(
    r"\s*(?:\$|\\\))?\s*(?:\\text\s*\{\s*)?(?:(?:hundred|thousand|million|billion|trillion|dozen|squared|cubed"
    r"|factorial|halves|thirds|fourths|fifths)\b|(?:times|plus|minus|choose|over|divided by)\b"
    r"(?:\s+or\s+minus)?[\s}]*[$\d\\])",
    re.IGNORECASE,
)
_HYPOTHESIS = re.compile(r"\b(?:if|were|would|unless|suppose|had)\b[^.\n]*\Z", re.IGNORECASE)
_NEXT_WORD = re.compile(r"\s+[A-Za-z](?![A-Za-z])|\s*[A-Za-z]\b(?=\s+[a-z]{2,})|\s+\d|[+/*]+[A-Za-z]{2,}")
_PERCENT_AFTER = re.compile(r"\s*(?:\}\s*)?(?:\$|\\\))?\s*(?:\\?%|percent\b|\\text\s*\{\s*percent\s*\})")
_VALUE = (
    r"[$\s*({]*(?:\\\()?(?P<value>-?(?:\d[\d,]*(?:\.\d+)?(?:/\d+)?(?:\\?%)?"
    r"|\\[dt]?frac\s*\{[^{}]*\}\s*\{[^{}]*\}|\\sqrt\s*\{[^{}]*\}))"
)
_ALTERNATIVE = re.compile(
    r"(?:[\s$)\]}]|\\[)\]])*(?:,?\s*(?:\\text\s*\{\s*)?(?:or|and)\b\s*\}?(?:\s+(?:maybe|perhaps|possibly|even))?"
    rf"|,\s*(?:maybe|perhaps|possibly)?)\s*{_VALUE}",
    re.IGNORECASE,
)
_CORRECTION = re.compile(
    r"(?:\bcorrection\b|\bshould (?:be|have been)|\bi (?:mean|meant)\b|\bmake that\b|\bscratch that\b|\bactually\b"
    r"|\bon second thoughts?\b|\binstead\b|\b(?:new|correct|right|true|real|final) (?:answer|value|result)\b"
    rf"|\banswer (?:is|becomes)\b)[^\d\n$\\.]{{0,40}}?{_VALUE}",
    re.IGNORECASE,
)
_RETRACTION = re.compile(
    r"\b(?:(?:that|this|it|which|the (?:above|answer|box))(?:'s| is| was)\s+"
    r"(?:wrong|incorrect|not (?:right|correct|the answer)|a mistake|false)"
    r"|scratch that|ignore (?:that|this|the above)|i made (?:a|an) (?:mistake|error)"
    r"|(?:not|isn't) the (?:right|correct) answer)\b",
    re.IGNORECASE,
)


def is_part_of_expression(text: str, start: int, end: int) -> bool:
    """Whether an operator, a factor, a relation or a negation stands directly around the box at [start, end)."""
    after = text[end : end + 40]
    if _OPERATION_IN_WORDS.match(after) or (_OPERATOR_AFTER.match(after) and not _NEXT_WORD.match(after)):
        return True
    before = _IDLE_BEFORE.sub("", text[max(0, start - _MAX_BEFORE_CHARS) : start])
    if words := _WORDS_IN_FORMULA.search(before):
        return _NEGATION_BEFORE.search(words[1]) is not None
    outside = _FORMULA_START.sub("", before)
    if _NEGATION_BEFORE.search(outside):
        return True
    line = before[max(before.rfind("\n"), before.rfind("&"), before.rfind("\\\\")) + 1 :]
    if outside == before and (line.count("$") % 2 == 1 or "\\(" in line or "\\" in line):
        return _OPERATOR_BEFORE.search(line) is not None
    # Outside of formulas only a sign that touches the box counts: "- " opens an item of a list.
    return _SIGN_BEFORE.search(outside) is not None


def withdraws(text: str, end: int) -> bool:
    """Whether the text after the box says that it is wrong."""
    return _RETRACTION.search(text, end, end + _MAX_AFTER_CHARS) is not None


def is_percentage(text: str, end: int) -> bool:
    """Whether a percent sign or the word follows the box."""
    return _PERCENT_AFTER.match(text, end) is not None


def later_values(text: str, end: int) -> tuple[str, ...]:
    """Returns the values that the text after the box offers as alternatives to it or as corrections of it."""
    values: list[str] = []
    position = end
    while len(values) < _MAX_VALUES and (match := _ALTERNATIVE.match(text, position)):
        values.append(match["value"])
        position = match.end()
    after = text[end : end + _MAX_AFTER_CHARS]
    corrections = (match for match in _CORRECTION.finditer(after) if not _HYPOTHESIS.search(after, 0, match.start()))
    return (*values, *(match["value"] for match in corrections))
