"""Words in answers: units, currencies, magnitudes, numbers spelled out, and phrases that mean the same."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from fractions import Fraction

from oreal_megatron.verifier.latex.unit_vocabulary import (
    CHANGING_WORDS,
    KNOWN_WORDS,
    LETTERS_OF_GOLD_UNITS,
    PHYSICAL_UNITS,
    SAME_UNIT,
    UNIT_LETTERS,
)

_ONES = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]  # fmt: skip
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_MAGNITUDES = {"dozen": 12, "hundred": 100, "thousand": 1_000, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_SMALL = {word: number for number, word in enumerate(_ONES)} | {word: 10 * (i + 2) for i, word in enumerate(_TENS)}

_CHINESE_QUALIFIER = re.compile("[不非无没约近至多少以上下百千万亿半倍或和与到]")
FRACTION_WORDS = {
    "half": 2, "halve": 2, "third": 3, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7, "eighth": 8, "ninth": 9,
    "tenth": 10, "hundredth": 100, "thousandth": 1_000,
}  # fmt: skip
DENIAL = re.compile(
    r"\b(?:wrong|incorrect|false|untrue|invalid|but|unless|if|when|plus|minus|times|half|above|below|guess\w*|cannot|never)\b|n't\b",
    re.IGNORECASE,
)
"""Words in a sentence around a value that withdraw or change it."""
COMPARATIVE = re.compile(
    r"\b(?:less|more|fewer|greater|least|most|not|no|or|between|than|about|approximately)\b", re.IGNORECASE
)
"""Words that turn the number next to them into another statement."""
_UNIT_TEXT = re.compile(
    r"(?P<number>.*?)\s*(?P<unit>(?:\\text\s*\{[^{}]*\}|\\degree|(?<=[\d}\s)])(?:[A-Za-z]{2,}|[mgshLKJNW])(?![A-Za-z({\\]))"
    r"(?:\s|\^\s*\{?\s*-?\d\s*\}?|/|\\cdot|\\text\s*\{[^{}]*\}|\\degree|[A-Za-z.]|\*)*)",
    re.DOTALL,
)
_POWERS = {"square": "2", "cubic": "3"}
_ANGLE_OF_FUNCTION = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")
_PERCENT_OF = re.compile(r"([^%]+)%\s*(\\text\s*\{[A-Za-z ]+\})")
_CURRENCY = re.compile(r"(-?)\s*\\(dollar|euro|pounds|yen|rupees)(?![A-Za-z])\s*(.+)", re.DOTALL)


@dataclass(frozen=True)
class Unit:
    """The normalised words of a unit in order, such as ("km", "/", "h")."""

    words: tuple[str, ...]
    is_known: bool = field(default=True, compare=False)
    """Whether all words are in the vocabulary of units, so that the number keeps its value."""

    def agrees(self, other: Unit) -> bool:
        """Whether the two may be the same: one has all the words of the other, such as "apples" and "red apples"."""
        mine, others = set(self.words) - {"/"}, set(other.words) - {"/"}
        if {self.words, other.words} == {("gbp",), ("lb",)}:
            return True  # "pounds" may be either
        return self.words == other.words or (
            bool(mine and others) and (mine <= others or others <= mine) and not (mine ^ others) & PHYSICAL_UNITS
        )


DEGREES = Unit(("deg",))
PERCENT = Unit(("percent",))


_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")


def is_prose(latex: str) -> bool:
    """Whether words are mixed into the mathematics, beyond a unit or a name."""
    inside = _TEXT.findall(latex)
    words = re.findall(r"(?<![\\A-Za-z])[A-Za-z]{3,}", " ".join(inside))
    bare = re.findall(r"(?:^|\s)[a-z]{3,}(?=\s|$)", _TEXT.sub(" ", latex))
    return len(inside) > 1 or len(words) > 1 or len(bare) > 1


def _singular(word: str) -> str:
    return word[:-1] if len(word) > 2 and word.endswith("s") and not word.endswith("ss") else word


def _unit_of(text: str) -> Unit | None:
    """Returns the unit in a piece of text; None if it holds words that change the meaning of the number."""
    text = re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", text).replace("\\degree", " degree ").replace("\\cdot", " ")
    text = re.sub(r"([A-Za-z]+)\s*\^\s*\{?\s*-1\s*\}?", r"/\1", text)
    text = re.sub(r"([ap])\.\s?m\.?", r"\1m", text, flags=re.IGNORECASE)
    if re.search(r"[^\w\s().,;:'\"/^{}\\-]|(?:^|\s)-\s*\d|\.\s*\d", text):
        return None
    words: list[str] = []
    is_known = True
    for written in re.findall(r"[A-Za-z]+\d*|/|-?\d+|[\u3400-\u9fff]+", text):
        word = written.lower()
        if len(written) == 1 and written.isascii() and written.isalpha():
            if written not in UNIT_LETTERS + LETTERS_OF_GOLD_UNITS and word != "a":
                return None
            is_known &= written in UNIT_LETTERS or word == "a"
        if _changes_value(word) and text.strip() != "times":
            return None
        word = "/" if word == "per" else word
        word = SAME_UNIT.get(word) or SAME_UNIT.get(_singular(word)) or _singular(word)
        is_known &= len(written) == 1 or not written[0].isascii() or _is_known_word(word)
        words.extend(re.findall(r"[a-z]+|/|\d+|[\u3400-\u9fff]+", word))
    if any(word.isdigit() and word not in ("1", "2", "3") for word in words):
        return None
    if len(words) == 2 and words[0] in _POWERS:
        words = [words[1], _POWERS[words[0]]]
    return Unit(tuple(words), is_known) if words or not re.search(r"\S", text.replace(".", " ")) else None


def _changes_value(word: str) -> bool:
    """Whether a word after a number makes it another value: a comparison, an operation, a number, a denial."""
    letters = word.rstrip("0123456789")
    return (
        word in CHANGING_WORDS
        or word in _SMALL
        or _singular(word) in FRACTION_WORDS
        or (letters not in ("", word) and letters not in PHYSICAL_UNITS and letters not in SAME_UNIT)
        or _CHINESE_QUALIFIER.search(word) is not None
    )


def _is_known_word(word: str) -> bool:
    return not word.strip("0123456789-") or all(
        part in KNOWN_WORDS or _singular(part) in KNOWN_WORDS or part in _MAGNITUDES or part.rstrip("23") in KNOWN_WORDS
        for part in word.split("/")
        if part
    )


def split_unit(latex: str) -> tuple[str, Unit | None, bool]:
    """Returns (expression, unit or None, whether a percent sign follows)."""
    latex = latex.strip()
    if match := _CURRENCY.fullmatch(latex):
        expression, unit, percent = split_unit(match[3])
        name = {"dollar": "usd", "euro": "eur", "pounds": "gbp", "yen": "jpy", "rupees": "inr"}[match[2]]
        if unit is None or unit.words == (name,):
            return match[1] + expression, Unit((name,)), percent
        return match[1] + expression, Unit((name, *unit.words)), percent
    if latex.endswith("%"):
        return latex[:-1].strip(), None, True
    if match := _PERCENT_OF.fullmatch(latex):
        return match[1].strip(), _unit_of(match[2]), True
    if "\\text" not in latex and "\\degree" not in latex and not re.search(r"\d\s*[A-Za-z]", latex):
        return latex, None, False
    match = _UNIT_TEXT.fullmatch(latex)
    if match is None or not match["number"].strip() or not any(c.isdigit() for c in match["number"]):
        return latex, None, False
    return _with_unit(latex, match["number"].strip(), match["unit"])


def _with_unit(latex: str, number: str, unit_text: str) -> tuple[str, Unit | None, bool]:
    if "\\degree" in unit_text and _ANGLE_OF_FUNCTION.search(number):
        return latex, None, False  # the degrees are the function's argument
    if "\\" not in unit_text and not (_known_unit(unit_text) or _COUNTED_THINGS.fullmatch(unit_text)):
        return latex, None, False  # letters without \text are variables, unless they are the name of a unit
    unit = _unit_of(unit_text)
    if unit is None:
        return latex, None, False
    if unit.words == ("percent",):
        return number, unit, True
    if unit.words[:1] and unit.words[0] in _MAGNITUDES:
        rest = Unit(unit.words[1:], unit.is_known) if unit.words[1:] else None
        return rf"({number})\cdot {_MAGNITUDES[unit.words[0]]}", rest, False
    return number, unit, False


_COUNTED_THINGS = re.compile(r"(?:[a-z]{4,}\s*){1,3}|ways")


def _known_unit(text: str) -> bool:
    words = re.findall("[a-z]+", text.lower())
    return bool(words) and all(
        len(word) >= 2
        and (word in PHYSICAL_UNITS or word in SAME_UNIT or _singular(word) in SAME_UNIT or word in _MAGNITUDES)
        for word in words
    )


def parse_word_number(text: str) -> Fraction | None:
    """Returns the value of a number in English words, such as "six" or "one thousand two hundred", or None."""
    words = re.findall("[a-z]+", re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", text.lower()))
    if not words or len(words) > 20 or re.search(r"[^a-z\s\-,]", re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", text.lower())):
        return None
    if _singular(words[-1]) in {*FRACTION_WORDS, "quarter"}:
        count = Fraction(1) if words[:-1] in (["a"], ["one"], []) else parse_word_number(" ".join(words[:-1]))
        parts = {**FRACTION_WORDS, "quarter": 4}[_singular(words[-1])]
        return None if count is None or (len(words) == 1 and words != ["half"]) else count / parts
    total = current = 0
    seen = False
    for word in words:
        if word in _SMALL:
            current += _SMALL[word]
            seen = True
        elif word == "hundred" and seen:
            current *= 100
        elif word in _MAGNITUDES and seen:
            total, current = total + current * _MAGNITUDES[word], 0
        elif word != "and":
            return None
    return Fraction(total + current) if seen else None


_FILLER = frozenset(["a", "an", "the", "is", "are", "of", "it", "be", "on", "at"])
_SAME_PHRASE = (
    ("no solution", "no solutions exist", "no real solution", "no real solutions exist", "no real number", "empty set",
     "there is no solution", "there are no solutions", "there is no real solution", "there are no real solutions",
     "none"),
    ("infinity", "infinite", "infinitely many", "infinitely many solutions", "there are infinitely many solutions"),
    ("does not exist", "dne"), ("all real number", "all reals", "set of all real numbers"),
)  # fmt: skip


def _plain_key(text: str) -> str:
    return " ".join(_singular(word) for word in re.findall(r"[^\W_]+", text.lower()) if word not in _FILLER)


_PHRASES = {_plain_key(phrase): _plain_key(group[0]) for group in _SAME_PHRASE for phrase in group}


def words_key(text: str) -> str:
    """Returns the key of a phrase: lower case, singular, without articles and punctuation."""
    key = _plain_key(text)
    return _PHRASES.get(key, key)


_NUMBER_IN_PROSE = re.compile(
    r"\\frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}|(\d+)\s*/\s*(\d+)|(\d[\d,]*(?:\.\d+)?)(\s*%)?"
)
_COMPUTED = re.compile(
    r"\\(?:sqrt|pi|log|ln|sin|cos|tan|binom|cdot|times)|\d\s*[!^*+]|[*^+-]\s*\d|\b(?:twice|double|triple|half|third|quarter|dozen"
    r"|hundred|thousand|million|billion|squared|cubed|plus|minus|negative|less|more|sum|product|quotient)s?\b",
    re.IGNORECASE,
)


def numbers_in_prose(text: str) -> list[Fraction]:
    """Returns the numbers that words state, in digits or words; none where the words compute with numbers."""
    if _COMPUTED.search(text) or not re.search(r"(?<![\\A-Za-z])[A-Za-z]{3,}", text):
        return []
    numbers: list[Fraction] = []
    for match in _NUMBER_IN_PROSE.finditer(text):
        top, bottom = int(match[1] or match[3] or 0), int(match[2] or match[4] or 0)
        if match[5] is None:
            numbers += [Fraction(top, bottom)] if bottom else []
        else:
            value = Fraction(match[5].replace(",", ""))
            numbers += [value, value / 100] if match[6] else [value]
    words = re.findall(r"[a-z]+(?:-[a-z]+)?", text.lower())
    named = (parse_word_number(word) for word in words if word != "one")  # "one" may be a pronoun
    return numbers + [number for number in named if number is not None]
