"""Caps on hostile text, checked before a parser reads it."""

from __future__ import annotations

import math
import re

MAX_EXPRESSION_CHARS = 8_192
MAX_DEPTH = 40
MAX_LITERAL_DIGITS = 4_000
MAX_EXPONENT = 20_000
MAX_FACTORIAL = 5_000
MAX_TOWER_LOG10 = 4.0


class Refused(ValueError):
    """Raised for a text that is beyond a cap."""


_CODE = re.compile(
    r"__\w|\bimport\b|\beval\b|\bexec\b|\blambda\s+\w+\s*:|\bos\.|\bsys\.|\bopen\s*\(|\bdef\s+\w+\s*\(|\bprint\s*\(|"
    r"\bsubprocess\b|\bgetattr\b|\\(?:input|write|immediate|include|catcode|def|newcommand|csname|loop)(?![A-Za-z])"
)
_HEDGE = re.compile(
    r"\b(?:or possibly|possibly|maybe|perhaps|either|not sure|unsure|unknown to me|i think|could be|might be|any of|"
    r"one of|all of the above|correct answer|gold[ _\\]*answer|ignore (?:all |the )?previous|grader)\b",
    re.IGNORECASE,
)
_EXPONENT = re.compile(r"\^\s*(?:\{\s*-?(\d+)\s*\}|-?(\d))")
_FACTORIAL = re.compile(r"(\d+|\))\s*\}?\s*!")
_BINOMIAL = re.compile(r"\\binom\s*\{\s*(\d+)")


def depth(latex: str) -> int:
    """Returns the deepest nesting of brackets; any closing bracket closes any opening bracket."""
    deepest = now = 0
    for char in latex:
        if char in "([{":
            now += 1
            deepest = max(deepest, now)
        elif char in ")]}":
            now = max(0, now - 1)
    return deepest


def check_answer(latex: str) -> None:
    """Checks the caps that hold for a whole answer. Raises Refused."""
    if depth(latex) > MAX_DEPTH:
        raise Refused(f"brackets nested deeper than {MAX_DEPTH}")


def looks_like_code(text: str) -> bool:
    """Whether the text looks like program text, which is never an answer."""
    return _CODE.search(text) is not None


def is_hedged(text: str) -> bool:
    """Whether the text holds words that withhold an answer, or that address the grader."""
    return _HEDGE.search(text) is not None


def check_expression(latex: str) -> None:
    """Checks the caps that keep the parser and sympy's automatic evaluation cheap. Raises Refused."""
    if len(latex) > MAX_EXPRESSION_CHARS:
        raise Refused(f"an expression of more than {MAX_EXPRESSION_CHARS} characters")
    check_answer(latex)
    if any(len(digits) > MAX_LITERAL_DIGITS for digits in re.findall(r"\d+", latex)):
        raise Refused(f"a number of more than {MAX_LITERAL_DIGITS} digits")
    for match in _EXPONENT.finditer(latex):
        digits = match[1] or match[2]
        if len(digits) > 9 or int(digits) > MAX_EXPONENT:
            raise Refused(f"an exponent beyond {MAX_EXPONENT}")
    if len(re.findall(r"\^", latex)) > 1 and _numeric_tower(latex):
        raise Refused("a tower of powers")
    for match in _FACTORIAL.finditer(latex):
        if match[1] != ")" and (len(match[1]) > 9 or int(match[1]) > MAX_FACTORIAL):
            raise Refused(f"a factorial beyond {MAX_FACTORIAL}")
    for match in _BINOMIAL.finditer(latex):
        if len(match[1]) > 9 or int(match[1]) > MAX_FACTORIAL:
            raise Refused(f"a binomial beyond {MAX_FACTORIAL}")


def _numeric_tower(latex: str) -> bool:
    """Whether the text has powers of literal numbers three levels high, or two levels with a large value."""
    if re.search(r"\d\s*\^\s*[{(\s]*\d+\s*\^\s*[{(\s]*\d+\s*\^", latex):
        return True
    pairs = re.finditer(r"\^\s*[{(\s]*(\d{1,6})\s*\^\s*[{(\s]*(\d{1,6})", latex)
    return any(float(match[2]) * math.log10(max(int(match[1]), 1)) > MAX_TOWER_LOG10 for match in pairs)
