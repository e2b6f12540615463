"""Text of a question without what does not change the problem: case, LaTeX's layout, punctuation."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

# Layout commands, dollar signs, and brackets that open and close formulas.
_LAYOUT = re.compile(
    r"\\(?:left|right|displaystyle|textstyle|limits|quad|qquad|mathrm|text|mbox)(?![a-z])|\\[,;!:()\[\]\\ ]|[$~]"
)
_FRACTION = re.compile(r"\\[dt]frac(?![a-z])")
_DIGIT_FRACTION = re.compile(r"\\frac\s*(\d)\s*(\d)")
# A LaTeX command, a word, a number, a character of a script without spaces, or an operator.
_TOKEN = re.compile(r"\\[a-z]+|[぀-ヿ㐀-鿿가-힯]|[^\W\d_]+|\d+|[^\s\w.?:;,\"“”`{}]")


def tokens(question: str) -> list[str]:
    """Returns words, numbers, commands and operators of a question in lower case, without punctuation and braces.

    A factorial's and a derivative's marks stay.
    """
    text = _LAYOUT.sub(" ", unicodedata.normalize("NFKC", question).lower().replace("’", "'"))
    return _TOKEN.findall(_DIGIT_FRACTION.sub(r"\\frac \1 \2", _FRACTION.sub(r"\\frac", text)))


def numbers(words: Sequence[str]) -> Counter[str]:
    """Returns how often each number occurs among the tokens of a question."""
    return Counter(word for word in words if word.isdigit())


def question_key(question: str) -> bytes:
    """Returns 16 bytes that are equal for questions that differ in case, punctuation and layout alone."""
    return hashlib.blake2b(" ".join(tokens(question)).encode(), digest_size=16).digest()
