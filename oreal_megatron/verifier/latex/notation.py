"""Rewriting of national and typed notations to the usual ones, and removal of the words around an answer.

Text to text; the commands of the LaTeX must be normalized already.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from oreal_megatron.verifier.latex.rational import parse_rational
from oreal_megatron.verifier.latex.units_and_words import COMPARATIVE, FRACTION_WORDS, parse_word_number

_MODULUS = re.compile(  # \text{ mod }12, \text{(mod 12)}, (\mod 12)
    r"\(?\s*\\text\s*\{\s*\(?\s*mod(?:ulo)?\s*(\w*)\s*\)?\s*\}\s*\{?\s*(\w*)\s*\}?\s*\)?"
    r"|\(\s*\\?mod(?![A-Za-z])\s*\{?\s*(\w+)\s*\}?\s*\)"
)
_SCRIPTED_CHOICES = re.compile(  # {}_9 C_4 and {}^9 C_4
    r"(?:^|\{\s*\})\s*[_^]\s*\{?\s*(\d{1,4})\s*\}?\s*(?:\\text\s*)?\{?\s*C\s*\}?\s*_\s*\{?\s*(\d{1,4})\s*\}?"
)
_RAISED_CHOICES = re.compile(r"(?<![A-Za-z\\])C\s*_\s*\{?\s*(\d{1,4})\s*\}?\s*\^\s*\{?\s*(\d{1,4})\s*\}?(?!\d)")
_LETTER_CHOICES = re.compile(  # C_n^3, C_{n+1}^{k}: chosen from the lower index, as the upper one is smaller
    r"(?<![A-Za-z\\])C\s*_\s*(?:\{\s*([\dn-z+\-]*[a-z][\dn-z+\-]*)\s*\}|([a-z]))\s*\^\s*(?:\{\s*([\da-z+\-]{1,9})\s*\}|([\da-z]))"
)
_MAPPING = re.compile(
    r"^(?:([A-Za-z])\s*:\s*(?=.*\\(?:mapsto|to)))?(?:[^,:]{1,40},\s*)?([a-z])\s*\\mapsto\s*(?![A-Za-z])(.+)$", re.DOTALL
)
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


_BASE = re.compile(
    r"(?<![\w.])(\w{1,60})\s*(?:\\text\s*\{\s*)?\(?\s*(?:in\s+)?base\s*[-\s]?\s*(?:\}\s*)?"
    rf"(\d{{1,2}}|{'|'.join(_BASE_NAMES)})\s*\)?\s*\}}?$"
)
_PARTS = {**FRACTION_WORDS, "quarter": 4}
_PREFIXED = re.compile(r"^0([xbo])([0-9A-Fa-f]+)$")
_PREFIXES = {"x": 16, "b": 2, "o": 8}


_NOTATIONS: tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = (
    (_CHINESE, _chinese),
    (re.compile(rf"\\text\{{[{_CJK}]*(?:答案|结果|等于)(?:是|为)?\}}\s*(?=\S)"), ""),
    (re.compile(r"\\(bar|overline|dot)\s*(\d)"), r"\\\1{\2}"),
    (_MODULUS, lambda m: rf"\pmod{{{m[1] or m[2] or m[3]}}}" if any(m.groups()) else m[0]),
    (_SCRIPTED_CHOICES, _binomial),
    (_RAISED_CHOICES, _binomial),
    (_LETTER_CHOICES, lambda m: f"\\binom{{{m[1] or m[2]}}}{{{m[3] or m[4]}}}"),
    (re.compile(r"^([A-Za-z])\s*:\s*([a-z])\s*\\to\s*(?=[^\\]|\\(?:frac|sqrt))"), r"\1:\2\\mapsto "),
    (_MAPPING, lambda m: f"{m[1] or 'f'}({m[2]})={m[3]}"),
    (re.compile(r"(?:\(|\{|\\overline\s*\{)\s*(\w{1,60})\s*[)}]\s*(?=_\s*[\d{])"), r"\1"),  # (101)_2
    (re.compile(r"(?<=\w)\s*_\s*\{\s*\(\s*(\d{1,2})\s*\)\s*\}$"), r"_{\1}"),
    (_BASE, lambda m: f"{m[1]}_{{{_BASE_NAMES.get(m[2], m[2])}}}" if re.search(r"\d", m[1]) else m[0]),
    (re.compile(r"\\mathbb\s*([A-Z])"), r"\\mathbb{\1}"),
    (
        re.compile(r"^\(\s*(-?[\d./]+)\s*\|\s*(-?[\d./]+)\s*(?:\|\s*(-?[\d./]+)\s*)?\)$"),
        lambda m: f"({','.join(filter(None, m.groups()))})",
    ),
    (re.compile(r"(?<=[\d})])(?:\s|\\,)*\\Omega(?![A-Za-z])(?=\s*$)"), r"\\text{ ohm}"),
    (re.compile(r"(?i)\bper\s+cent\b"), "percent"),
    (re.compile(r"(?i)\bo'clock\b"), "oclock"),
    (re.compile(r"\\text\s*\{\s*\\(dollar|euro|pounds|yen|rupees)\s*\}"), r"\\\1 "),
    (re.compile(r"^(?:US|U\.S\.)\s*(?=\\dollar)"), ""),
    (re.compile(r"^(-?\d[\d,.]*)\s*(\\(?:dollar|euro|pounds|yen|rupees))\s*$"), r"\2 \1"),
    (
        re.compile(r"^(-?\d+)\s*(?:\\text\s*\{\s*)?and\s+(?:an?|one)\s+(half|third|quarter|fourth|fifth)\s*\}?$"),
        lambda m: f"{m[1]}\\frac{{1}}{{{_PARTS[m[2]]}}}",
    ),
    (
        re.compile(rf"_\s*\{{?\s*\\text\s*\{{\s*({'|'.join(_BASE_NAMES)})\s*\}}\s*\}}?"),
        lambda m: f"_{{{_BASE_NAMES[m[1]]}}}",
    ),
    (re.compile(r"-\s*\\text\s*\{\s*infinity\s*\}|\\text\s*\{\s*(?:negative|minus)\s+infinity\s*\}"), r"-\\infty "),
    (re.compile(r"(\\mathbb\s*\{\s*R\s*\})\s*-\s*(?=\\\{)"), r"\1\\setminus "),
    (
        re.compile(r"\\text\s*\{\s*(\d{1,2}\s*:\s*[0-5]\d)\s*([AaPp])\.?\s?[Mm]\.?\s*\}"),
        lambda m: rf"{m[1]}\text{{ {m[2].lower()}m}}",
    ),
    (re.compile(r"(?<=\d)\s*([AaPp])\.\s?[Mm]\.?(?![A-Za-z])"), lambda m: rf"\text{{ {m[1].lower()}m}}"),
    (re.compile(r"^(-?\d+\s*\\pmod\s*\{\s*\w+\s*\})$"), r"x\\equiv \1"),
    (re.compile(r"^(?:\\text\s*\{\s*)?(USD|EUR|GBP|Rs)\.?\s*\}?\s*(?=\d)"), lambda m: f"\\{_CURRENCIES[m[1]]} "),
)


def usual_notation(text: str) -> str:
    r"""Rewrites `C_9^4` to `\binom{9}{4}`, `(101)_2` to `101_2`, `\text{ mod }5` to `\pmod{5}`, and so on."""
    for pattern, replacement in _NOTATIONS:
        text = pattern.sub(replacement, text)
    return text


_UNIT_VECTOR = r"\\(?:hat|mathbf|boldsymbol|bm|vec|overrightarrow|bar)\s*\{?\s*\\?([ijk])(?:math)?\s*\}?"
_VECTOR_TERM = re.compile(
    rf"\s*([+-]?)\s*((?:[\dA-Za-z./\s]|\\(?:frac|sqrt)|\{{[^{{}}]{{1,30}}\}}|\([^()]{{1,40}}\)){{0,9}}?)\s*{_UNIT_VECTOR}"
)


def unit_vectors(text: str) -> str:
    r"""Rewrites `\hat{i}-2\hat{j}+3\hat{k}` to `(1,-2,3)`; a vector without `\hat{k}` has two components."""
    terms = list(_VECTOR_TERM.finditer(text)) if text.count("\\") <= 40 else []
    if not terms or _VECTOR_TERM.sub("", text).strip(" .$"):
        return text
    names = [term[3] for term in terms]
    if len(set(names)) < len(names) or len(names) < 2 or not all(term[1] for term in terms[1:]):
        return text
    parts = {term[3]: (term[1].replace("+", "") + (term[2].strip() or "1")) for term in terms}
    return "(" + ",".join(parts.get(name, "0") for name in ("ijk" if "k" in parts else "ij")) + ")"


_FRACTION_TAIL = re.compile(r"(-?\d+)\s*\\text\s*\{\s*([a-z]+?)s?\s*\}")
_OPERATION_TAIL = re.compile(
    r"(-?\d+)\s*\\text\s*\{\s*(squared|cubed|factorial|choose|over|divided by|times|plus|minus"
    r"|(?:square )?root|sqrt|pi)\s*"
    r"(?:\(?(\d+)\)?\s*\}|\}\s*(\d+)|\})"
)


_SIGNS = {"times": "\\cdot ", "plus": "+", "minus": "-"}
_NUMBER_IN_WORDS = re.compile(r"(-?\d+)\s*\\text\s*\{\s*\(([a-z\s-]+)\)\s*\}")


def _operation(match: re.Match[str]) -> str:
    number, operand = match[1], match[3] or match[4]
    unary = {
        "squared": f"({number})^{{2}}",
        "cubed": f"({number})^{{3}}",
        "factorial": f"({number})!",
        "pi": f"{number}\\pi ",
    }
    if match[2] in unary:
        return match[0] if operand else unary[match[2]]
    if not operand:
        return match[0]
    if match[2] in _SIGNS:
        return f"{number}{_SIGNS[match[2]]}{operand}"
    if match[2] == "choose":
        return f"\\binom{{{number}}}{{{operand}}}"
    return f"\\frac{{{number}}}{{{operand}}}" if match[2] in ("over", "divided by") else f"{number}\\sqrt{{{operand}}}"


def operations_in_words(text: str) -> str:
    r"""Rewrites `7\text{ halves}` to `\frac{7}{2}`, `7\text{ choose }2` to `\binom{7}{2}`, and so on."""
    if (match := _FRACTION_TAIL.fullmatch(text)) and match[2] in FRACTION_WORDS and match[2] != "half":
        return f"\\frac{{{match[1]}}}{{{FRACTION_WORDS[match[2]]}}}"
    if (match := _NUMBER_IN_WORDS.fullmatch(text)) and parse_word_number(match[2]) == int(match[1]):
        return match[1]
    match = _OPERATION_TAIL.fullmatch(text)
    return _operation(match) if match else text


_NUMBER = r"-?[\d.,/]*\d"
_QUANTITY_IN_TEXT = re.compile(rf"^\\text\s*\{{\s*({_NUMBER})\s+([A-Za-z][A-Za-z ]*)\}}")
_LIST_IN_TEXT = re.compile(rf"\\text\s*\{{\s*((?:{_NUMBER}\s*(?:,\s*and\s|,|and\s|or\s)\s*)+{_NUMBER})\s*\}}")
_EQUALS = re.compile(r"\\text\s*\{\s*(?:is|are|equals|is equal to)\s*\}")
_STATEMENT = re.compile(
    r"\\text\s*\{\s*([^{}:=]{1,80}?)\s*(?::|=|(?<=\s)is(?: equal to)?|(?<=\s)equals|(?<=\s)are)\s*"
    rf"(?:\}}\s*(?=[^\s}}])|({_NUMBER})\s*\.?\s*\}}$)"
)
_INTRODUCTION = re.compile(
    r"^\\text\s*\{\s*(?:thus|so|hence|therefore|then|exactly|precisely|we get|we have|ans(?:wer)?\.?)"
    r"\s*[,:.]?\s*\}\s*[,:]?\s*(?=\S)",
    re.IGNORECASE,
)
_FOR_ALL = re.compile(
    r"(?<=\S)\s*,?\s*\\text\s*\{\s*,?\s*for\s+(?:all|any|every|each)\s+(?:real\s+|complex\s+)?(?:numbers?\s*|values?\s+of\s*)?\}"
    r"\s*[a-z]\s*(?:\\in\s*\\mathbb\s*\{?\s*[RC]\s*\}?)?$"
)
_DENIAL = re.compile(r"\b(?:not|no|wrong|incorrect|false|except|neither|never|cannot|if|when)\b|n't\b", re.IGNORECASE)


def _statement(match: re.Match[str]) -> str:
    if not re.search("[A-Za-z]", match[1]) or COMPARATIVE.search(match[1]) or _DENIAL.search(match[1]):
        return match[0]
    return rf"\text{{{match[1]}}}={match[2] or ''}"


def without_phrases(text: str) -> str:
    r"""Rewrites `\text{The area is }5` to `\text{The area}=5`, `\text{So, }5` to `5`, and so on."""
    if "\\text" not in text:
        return text
    text = _FOR_ALL.sub("", _INTRODUCTION.sub("", text))
    text = _QUANTITY_IN_TEXT.sub(r"\1\\text{ \2}", text)
    text = _LIST_IN_TEXT.sub(r"\1", text)
    return operations_in_words(_STATEMENT.sub(_statement, _EQUALS.sub("=", text), count=1))


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


_INDIAN = re.compile(r"\d{1,2}(?:,\d{2})+,\d{3}(?:\.\d+)?")
_DOTTED_GROUPS = re.compile(r"(-?\d{1,3}(?:\.\d{3}){2,})|(-?\d{1,3}(?:'\d{3})+)(?:\.(\d+))?")
_DECIMAL_COMMA = re.compile(r"(-?)(\d{1,3}(?:[. ]\d{3})*|\d+)\s*\{?,\}?(\d+)(\s*%)?")


def usual_number(text: str, gold: str) -> str:
    """Rewrites a number with the separators of other languages: `1.234.567`, `1'234`, `1.234,5`, `12,34,567`, `0x2F`.

    A text that could also be a list, such as `3,5`, is a number only where it then has the value of the gold answer.
    """
    if match := _DOTTED_GROUPS.fullmatch(text):
        return re.sub(r"[.']", "", match[1] or match[2]) + (f".{match[3]}" if match[3] else "")
    if "_" in gold and (match := _PREFIXED.fullmatch(text)):
        return f"{match[2].upper()}_{{{_PREFIXES[match[1]]}}}"
    wanted = parse_rational(gold.rstrip("% "))
    if wanted is None:
        return text
    if wanted.denominator > 1 and (match := _DECIMAL_COMMA.fullmatch(text)):
        number = f"{match[1]}{re.sub('[. ]', '', match[2])}.{match[3]}"
        is_grouped = len(match[3]) == 3 and match[2] != "0" and not re.search("[. ]", match[2])
        if not is_grouped and parse_rational(number) == wanted:
            return number + (match[4] or "")
    if _INDIAN.fullmatch(text) and parse_rational(text.replace(",", "")) == wanted:
        return text.replace(",", "")
    return text
