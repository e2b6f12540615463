"""Plain numbers, which most final answers are, as exact fractions; without sympy."""

from __future__ import annotations

import re
from fractions import Fraction

MAX_DIGITS = 10_000
"""Length of the longest text that is read as a number."""
MAX_DECIMAL_EXPONENT = 4_000

_INTEGER = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
_DECIMAL = re.compile(rf"({_INTEGER})?(?:\.(\d*))?")
_SCIENTIFIC = re.compile(
    r"(\d+(?:\.\d*)?|\.\d+)\s*(?:[eE]\s*([+-]?\d+)|(?:\\times|\\cdot|\*)\s*10\s*\^\s*(?:\{\s*([+-]?\s*\d+)\s*\}|([+-]?\d)))"
)
_POWER_OF_TEN = re.compile(r"10\s*\^\s*(?:\{\s*([+-]?\d+)\s*\}|(\d))")
_REPEATING = re.compile(r"(\d*)\.(\d*)\\(?:overline|bar|dot)\s*\{\s*(\d{1,200})\s*\}")
_DOTTED = re.compile(r"\\dot\s*\{\s*(\d)\s*\}(\d*)\\dot\s*\{\s*(\d)\s*\}$")
_ENDLESS = re.compile(r"(\d*)\.(\d{2,100}?)\s*(?:\\ldots|\.{3})")
_PERIOD_SEEN = re.compile(r"(\d*?)(?:(\d)\2{2,}|(\d{2,}?)\3+)")
_FRACTION = re.compile(rf"\\frac\s*\{{\s*([+-]?\s*{_INTEGER})\s*\}}\s*\{{\s*([+-]?\s*{_INTEGER})\s*\}}")
_SLASH = re.compile(rf"({_INTEGER})\s*/\s*(-?\s*{_INTEGER})")
_MIXED = re.compile(rf"({_INTEGER})\s*\\frac\s*\{{\s*(\d+)\s*\}}\s*\{{\s*(\d+)\s*\}}|({_INTEGER})\s+(\d+)\s*/\s*(\d+)")


def _integer(digits: str) -> int:
    return int(digits.replace(",", "").replace(" ", ""))


def _decimal(text: str) -> Fraction | None:
    match = _DECIMAL.fullmatch(text)
    if match is None or (not match[1] and not match[2]):
        return None
    whole, part = (match[1] or "0").replace(",", ""), match[2] or ""
    return Fraction(int(whole + part), 10 ** len(part))


def _scientific(text: str) -> Fraction | None:
    if match := _SCIENTIFIC.fullmatch(text):
        mantissa, exponent = _decimal(match[1]), int((match[2] or match[3] or match[4]).replace(" ", ""))
    elif match := _POWER_OF_TEN.fullmatch(text):
        mantissa, exponent = Fraction(1), int(match[1] or match[2])
    else:
        return None
    if mantissa is None or abs(exponent) > MAX_DECIMAL_EXPONENT:
        return None
    return mantissa * Fraction(10) ** exponent


def _repeating(text: str) -> Fraction | None:
    r"""Reads `0.1\overline{6}`, `0.\dot{1}4285\dot{7}`, and `0.1666\ldots` if the period is repeated often enough."""
    text = _DOTTED.sub(r"\\overline{\1\2\3}", text)
    if endless := _ENDLESS.fullmatch(text):
        seen = _PERIOD_SEEN.fullmatch(endless[2])
        if seen is None:
            return None
        text = f"{endless[1]}.{seen[1]}\\overline{{{seen[2] or seen[3]}}}"
    match = _REPEATING.fullmatch(text)
    if match is None:
        return None
    whole, fixed, repeated = match[1] or "0", match[2], match[3]
    head = int(whole + fixed)
    return Fraction(head * (10 ** len(repeated) - 1) + int(repeated), (10 ** len(repeated) - 1) * 10 ** len(fixed))


def _quotient(text: str) -> Fraction | None:
    if match := _FRACTION.fullmatch(text) or _SLASH.fullmatch(text):
        bottom = _integer(match[2])
        return Fraction(_integer(match[1]), bottom) if bottom else None
    if match := _MIXED.fullmatch(text):
        whole, top, bottom_digits = (match[1], match[2], match[3]) if match[1] else (match[4], match[5], match[6])
        if not int(bottom_digits) or int(top) >= int(bottom_digits):
            return None  # not a mixed number: "2 \frac{5}{3}" may be a product
        return _integer(whole) + Fraction(int(top), int(bottom_digits))
    return None


def parse_rational(text: str) -> Fraction | None:
    """Returns the exact value of a normalised plain number, or None for every other text."""
    text = text.strip()
    if len(text) > MAX_DIGITS or not any(char.isdigit() for char in text):
        return None
    sign = 1
    while text[:1] in ("+", "-"):
        sign = -sign if text[0] == "-" else sign
        text = text[1:].lstrip()
        if sign < 0 and text[:1] in ("+", "-"):
            return None
    if max(map(len, re.findall(r"\d+", text)), default=0) > 4_000:
        return None
    for reader in (_decimal, _quotient, _scientific, _repeating):
        value = reader(text)
        if value is not None:
            return sign * value
    return None
