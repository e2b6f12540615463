"""Rewriting of national and typed notations to the usual ones, and removal of the words around an answer.

Text to text; the commands of the LaTeX must be normalized already.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from oreal_megatron.verifier.latex.units_and_words import COMPARATIVE

_MODULUS = re.compile(  # \text{ mod }12, \text{(mod 12)}, (\mod 12)
    r"\(?\s*\\text\s*\{\s*\(?\s*mod(?:ulo)?\s*(\w*)\s*\)?\s*\}\s*\{?\s*(\w*)\s*\}?\s*\)?"
    r"|\(\s*\\?mod(?![A-Za-z])\s*\{?\s*(\w+)\s*\}?\s*\)"
)
_SCRIPTED_CHOICES = re.compile(  # {}_9 C_4 and {}^9 C_4
    r"(?:^|\{\s*\})\s*[_^]\s*\{?\s*(\d{1,4})\s*\}?\s*(?:\\text\s*)?\{?\s*C\s*\}?\s*_\s*\{?\s*(\d{1,4})\s*\}?"
)
_RAISED_CHOICES = re.compile(r"(?<![A-Za-z\\])C\s*_\s*\{?\s*(\d{1,4})\s*\}?\s*\^\s*\{?\s*(\d{1,4})\s*\}?(?!\d)")
_BASE_NAMES = {
    "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10,
    "twelve": 12, "sixteen": 16,
}  # fmt: skip
_CJK = "\u3400-\u9fff"
_CURRENCIES = {"USD": "dollar", "EUR": "euro", "GBP": "pounds", "Rs": "rupees"}


def _binomial(match: re.Match[str]) -> str:
    """Rewrites C_9^4 and C_4^9, which are both in use, as the larger number over the smaller; C_1^2 is a square."""
    first, second = int(match[1]), int(match[2])
    return match[0] if max(first, second) < 3 else f"\\binom{{{max(first, second)}}}{{{min(first, second)}}}"


_CHINESE = re.compile(rf"(?:\\text\s*\{{\s*)?([{_CJK}]+)[:\s]*\}}?")
_CHINESE_WORDS = (("或者", " or "), ("或", " or "), ("和", " and "), ("与", " and "))


def _chinese(match: re.Match[str]) -> str:
    r"""Rewrites `2或3` to `2\text{ or }3`, and `42个` to `42\text{个}`."""
    words = match[1]
    for chinese, english in _CHINESE_WORDS:
        if words == chinese:
            return rf"\text{{{english}}}"
    return rf"\text{{{words}}}"


_NOTATIONS: tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = (
    (_CHINESE, _chinese),
    (re.compile(rf"\\text\{{[{_CJK}]*(?:答案|结果|等于)(?:是|为)?\}}\s*(?=\S)"), ""),
    (re.compile(r"\\(bar|overline|dot)\s*(\d)"), r"\\\1{\2}"),
    (_MODULUS, lambda m: rf"\pmod{{{m[1] or m[2] or m[3]}}}" if any(m.groups()) else m[0]),
    (_SCRIPTED_CHOICES, _binomial),
    (_RAISED_CHOICES, _binomial),
    (re.compile(r"\(\s*(\w{1,60})\s*\)\s*(?=_\s*[\d{])"), r"\1"),  # (101)_2
    (
        re.compile(rf"_\s*\{{?\s*\\text\s*\{{\s*({'|'.join(_BASE_NAMES)})\s*\}}\s*\}}?"),
        lambda m: f"_{{{_BASE_NAMES[m[1]]}}}",
    ),
    (re.compile(r"-\s*\\text\s*\{\s*infinity\s*\}|\\text\s*\{\s*(?:negative|minus)\s+infinity\s*\}"), r"-\\infty "),
    (re.compile(r"(\\mathbb\s*\{\s*R\s*\})\s*-\s*(?=\\\{)"), r"\1\\setminus "),
    (re.compile(r"(?<=\d)\s*([ap])\.\s?m\.?(?![A-Za-z])"), r"\\text{ \1m}"),
    (re.compile(r"^(-?\d+\s*\\pmod\s*\{\s*\w+\s*\})$"), r"x\\equiv \1"),
    (re.compile(r"^(?:\\text\s*\{\s*)?(USD|EUR|GBP|Rs)\.?\s*\}?\s*(?=\d)"), lambda m: f"\\{_CURRENCIES[m[1]]} "),
)


def usual_notation(text: str) -> str:
    r"""Rewrites `C_9^4` to `\binom{9}{4}`, `(101)_2` to `101_2`, `\text{ mod }5` to `\pmod{5}`, and so on."""
    for pattern, replacement in _NOTATIONS:
        text = pattern.sub(replacement, text)
    return text


_NUMBER = r"-?[\d.,/]*\d"
_QUANTITY_IN_TEXT = re.compile(rf"^\\text\s*\{{\s*({_NUMBER})\s+([A-Za-z][A-Za-z ]*)\}}")
_LIST_IN_TEXT = re.compile(rf"\\text\s*\{{\s*((?:{_NUMBER}\s*(?:,\s*and\s|,|and\s|or\s)\s*)+{_NUMBER})\s*\}}")
_EQUALS = re.compile(r"\\text\s*\{\s*(?:is|are|equals|is equal to)\s*\}")
_STATEMENT = re.compile(
    r"\\text\s*\{\s*([^{}:=]{1,80}?)\s*(?::|=|(?<=\s)is(?: equal to)?|(?<=\s)equals|(?<=\s)are)\s*"
    rf"(?:\}}\s*(?=[^\s}}])|({_NUMBER})\s*\.?\s*\}}$)"
)
_INTRODUCTION = re.compile(
    r"^\\text\s*\{\s*(?:thus|so|hence|therefore|then|we get|we have|ans(?:wer)?\.?)\s*[,:.]?\s*\}\s*[,:]?\s*(?=\S)",
    re.IGNORECASE,
)
_DENIAL = re.compile(r"\b(?:not|no|wrong|incorrect|false|except|neither|never|cannot|if|when)\b|n't\b", re.IGNORECASE)


def _statement(match: re.Match[str]) -> str:
    if COMPARATIVE.search(match[1]) or _DENIAL.search(match[1]):
        return match[0]
    return rf"\text{{{match[1]}}}={match[2] or ''}"


def without_phrases(text: str) -> str:
    r"""Rewrites `\text{The area is }5` to `\text{The area}=5`, `\text{So, }5` to `5`, and so on."""
    if "\\text" not in text:
        return text
    text = _INTRODUCTION.sub("", text)
    text = _QUANTITY_IN_TEXT.sub(r"\1\\text{ \2}", text)
    text = _LIST_IN_TEXT.sub(r"\1", text)
    return _STATEMENT.sub(_statement, _EQUALS.sub("=", text), count=1)


_CONDITION = re.compile(
    r"(?P<expression>.+?)\s*(?:,|\\text\s*\{\s*,?\s*(?:for|where|if|when|with|provided|and)?\s*(?:that)?\s*\}|\()\s*"
    r"(?P<name>[a-z])\s*\\ne\s*[^,=<>]{1,40}",
    re.DOTALL,
)


def without_excluded_points(text: str) -> str:
    r"""Rewrites `\frac{1}{x}, x\ne 0` to `\frac{1}{x}`: points without a value need not be stated."""
    match = _CONDITION.fullmatch(text)
    if match is None or re.search(r"[=<>,]|\\(?:le|ge|ne|in|cup|cap|mathbb)(?![A-Za-z])", match["expression"]):
        return text
    return match["expression"] if re.search(rf"(?<![A-Za-z\\]){match['name']}", match["expression"]) else text
