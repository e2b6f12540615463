"""Parser of the shape of a final answer: list, tuple, interval, relation, matrix, quantity, ... around expressions.

The leaves stay LaTeX of single expressions, which `equality` compares.
"""

from __future__ import annotations

import re

from oreal_megatron.verifier.latex.nodes import (
    Based,
    Bracketed,
    Collection,
    Leaf,
    Matrix,
    Node,
    Ratio,
    Relation,
    SetOperation,
    Text,
)
from oreal_megatron.verifier.latex.normalize import matching_brace
from oreal_megatron.verifier.latex.rational import parse_rational
from oreal_megatron.verifier.latex.units_and_words import parse_word_number, split_unit, words_key

_OPENING = {
    "(": ")",
    "[": "]",
    "{": "}",
    "\\{": "\\}",
    "\\langle": "\\rangle",
    "\\lfloor": "\\rfloor",
    "\\lceil": "\\rceil",
}
_CLOSING = frozenset(_OPENING.values())
_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|.", re.DOTALL)
RELATIONS = {
    "=": "=", "<": "<", ">": ">", "\\lt": "<", "\\gt": ">", "\\le": "<=", "\\ge": ">=", "\\ne": "!=",
    "\\approx": "~", "\\sim": "~", "\\in": "in", "\\equiv": "mod", "\\to": "->", "\\Rightarrow": "=>",
}  # fmt: skip
_BASED = re.compile(r"(-?)([0-9A-Za-z]*\d[0-9A-Za-z]*|[A-Fa-f]{2,})\s*_\s*(?:\{\s*(\d{1,2})\s*\}|(\d{1,2}))")
_ROWS = re.compile(
    r"(?:\\\{\s*)?\\begin\{(cases|aligned|array|gathered|matrix)\}(?:\s*\{[lcr| ]{0,60}\})?(.*)\\end\{\1\}(?:\s*\.)?",
    re.DOTALL,
)
_MATRIX = re.compile(r"\\begin\{([pbB]?matrix|smallmatrix|array)\}(?:\s*\{[lcr| ]{0,60}\})?(.*)\\end\{\1\}", re.DOTALL)
_WORD_SEPARATOR = re.compile(r"\\text\s*\{\s*,?\s*(and|or)\s*,?\s*\}|(?<![A-Za-z\\])(and|or)(?![A-Za-z])")
_TEXT_COMMAND = re.compile(r"\\text\s*\{([^{}]*)\}")
_PLAIN_WORDS = re.compile(r"[A-Za-z][A-Za-z' ,.\-!?]*")


def tokens_of(latex: str) -> list[tuple[re.Match[str], int]]:
    """Returns the LaTeX tokens, each with its depth in brackets; any closing bracket closes any opening bracket."""
    tokens: list[tuple[re.Match[str], int]] = []
    depth = 0
    for match in _TOKEN.finditer(latex):
        text = match[0]
        if text in _CLOSING:
            depth -= 1
        tokens.append((match, depth))
        if text in _OPENING:
            depth += 1
    return tokens


def split_top(latex: str, separators: frozenset[str]) -> list[str]:
    """Splits the text at separators that are outside of all brackets."""
    parts, position = [], 0
    for token, depth in tokens_of(latex):
        if depth == 0 and token[0] in separators:
            parts.append(latex[position : token.start()].strip())
            position = token.end()
    parts.append(latex[position:].strip())
    return parts


def _split_relation(latex: str) -> Node | None:
    items, operators, position = [], [], 0
    for token, depth in tokens_of(latex):
        if depth == 0 and token[0] in RELATIONS:
            items.append(latex[position : token.start()].strip())
            operators.append(RELATIONS[token[0]])
            position = token.end()
    if not operators:
        return None
    items.append(latex[position:].strip())
    if not items[0] and operators[0] in ("=", "~") and len(items) > 1:
        items, operators = items[1:], operators[1:]  # "= 5" and "\\approx 5" state 5
    if any(not item for item in items):
        return None
    if not operators:
        return parse(items[0])
    return Relation(tuple(parse(item) for item in items), tuple(operators))


_BUILDER = re.compile(r"\s*[A-Za-z]\s*(?:\\in\s*\\mathbb\s*\{?\s*R\s*\}?)?\s*(?:\||:)(.+)", re.DOTALL)


def _set_of(inside: str) -> Node:
    builder = _BUILDER.fullmatch(inside)
    if builder and isinstance(condition := parse(builder[1].strip()), (Relation, Collection, SetOperation)):
        return condition  # {x | x > 0}
    return Collection(_flatten([parse(part) for part in split_top(inside, frozenset(",;")) if part]), braces=True)


def _bracketed(latex: str) -> Node | None:
    tokens = tokens_of(latex)
    if len(tokens) < 2:
        return None
    (first, _), *middle, (last, _) = tokens
    opening, closing = first[0], last[0]
    if opening not in ("(", "[", "\\{", "\\langle", "]") or closing not in _CLOSING | {"["}:
        return None
    if any(depth <= 0 for _, depth in middle) and opening != "]":
        return None
    inside = latex[first.end() : last.start()].strip()
    if closing == "[":
        closing = ")"  # ]0,1[ as the French write (0,1)
    opening = "(" if opening == "]" else opening
    if opening == "\\{" and closing == "\\}":
        if not inside:
            return Collection((), braces=True)
        return _set_of(inside)
    if opening == "\\{" or closing == "\\}":
        return None
    parts = split_top(inside, frozenset(",;"))
    if len(parts) == 1:
        if (opening, closing) == ("[", "]") and inside.startswith("\\begin"):
            return _matrix(inside)
        return parse(inside) if (opening, closing) == ("(", ")") and inside else None
    return Bracketed(tuple(parse(part) for part in parts), opening, closing)


def _system(latex: str) -> Collection | None:
    """Reads equations in rows as a list."""
    match = _ROWS.fullmatch(latex)
    inside = match[2] if match else latex
    if "\\newrow" not in inside or "\\begin" in inside:
        return None
    rows = [row.replace("&", " ").strip(" ,;") for row in inside.split("\\newrow")]
    parts = [parse(row) for row in rows if row]
    if len(parts) < 2 or not all(isinstance(part, Relation) for part in parts):
        return None
    return Collection(tuple(parts))


def _matrix(latex: str) -> Matrix | None:
    match = _MATRIX.fullmatch(latex)
    if match is None or "\\begin" in match[2]:
        return None
    rows = [row.strip() for row in match[2].replace("\\hline", "").split("\\newrow")]
    cells = [tuple(parse(cell.strip()) for cell in row.split("&")) for row in rows if row]
    return Matrix(tuple(cells)) if cells and all(len(row) == len(cells[0]) for row in cells) else None


_TRANSPOSE = re.compile(r"(.+[)\]}])\s*\^\s*\{?\s*(?:T|t|\\top|\\intercal|\\text\s*\{\s*T\s*\})\s*\}?", re.DOTALL)


def _transposed(latex: str) -> Node | None:
    """Reads a transposed tuple or matrix."""
    match = _TRANSPOSE.fullmatch(latex)
    node = parse(match[1]) if match else None
    if isinstance(node, Matrix):
        return Matrix(tuple(zip(*node.rows, strict=True)))
    return Bracketed(node.parts, "(", ")") if isinstance(node, Bracketed) else None


def _based(latex: str) -> Based | None:
    match = _BASED.fullmatch(latex)
    if match is None:
        return None
    digits, base = match[2].upper(), int(match[3] or match[4])
    if not 2 <= base <= 36:
        return None
    try:
        int(digits, base)
    except ValueError:
        return None
    return Based(match[1] + (digits.lstrip("0") or "0"), base)


def _text(words: str, latex: str) -> Node:
    return Leaf(r"\mathbb{R}") if words_key(words) == "all real number" else Text(words, latex)


def _words(latex: str) -> Node | None:
    """Reads an answer that is only text."""
    without = _TEXT_COMMAND.sub("", latex).strip(" .,;:!?-")
    if "\\text" in latex and not without:
        words = " ".join(match[1].strip() for match in _TEXT_COMMAND.finditer(latex)).strip()
        if re.fullmatch(r"[\d.,/:%\s-]+|\d+ to \d+|[A-Za-z]\s*=\s*[\d./-]+", words):
            return parse(words)
        if quantity := re.fullmatch(r"(-?[\d.,/]+)\s+([A-Za-z][A-Za-z ]*)", words):
            return parse(f"{quantity[1]}\\text{{{quantity[2]}}}")
        return _text(words, latex)
    if (
        _PLAIN_WORDS.fullmatch(latex)
        and (len(latex) > 3 or " " in latex)
        and len(re.findall("[A-Za-z]{3,}", latex)) > 0
    ):
        return _text(latex.strip(), latex)
    return None


_ALL_BUT = re.compile(
    r"(?:\\text\s*\{\s*)?(?:all|every|any)\s+(?:reals?|real\s+numbers?)(?:\s+[a-z])?\s*,?\s*(?:except|other\s+than|but)(?:\s+for)?\s*\}?(.+)",
    re.IGNORECASE | re.DOTALL,
)
_POINT = re.compile(r"([A-Z](?:_\{?\d\}?|'{1,2})?)\s*(\(.+\))", re.DOTALL)


def _all_but(latex: str) -> SetOperation | None:
    """Reads `all real numbers except 1 and 2`."""
    match = _ALL_BUT.fullmatch(latex)
    if match is None:
        return None
    removed = parse(re.sub(r"^\s*\{?\s*[a-z]\s*=", "", match[1]).rstrip("} "))
    points = removed.parts if isinstance(removed, Collection) else (removed,)
    return SetOperation("difference", (Leaf(r"\mathbb{R}"), Collection(points, braces=True)))


def _point(latex: str) -> Relation | None:
    """Reads `P(3,4)`, a point with its name."""
    match = _POINT.fullmatch(latex)
    place = _bracketed(match[2]) if match else None
    if match is None or not isinstance(place, Bracketed):
        return None
    return Relation((Leaf(match[1]), place), ("=",))


_CLOCK = re.compile(r"\d{1,2}\s*:\s*[0-5]\d(?:\s*(?:\\text\s*\{[^{}]*\}|[AaPp]\.?[Mm]\.?))?")


def _ratio(latex: str) -> Ratio | None:
    latex = re.sub(r"(?<=[\d}])\s*(?:\\text\s*\{\s*to\s*\}|(?<![A-Za-z])to(?![A-Za-z]))\s*", ":", latex)
    parts = split_top(latex, frozenset({":", "\\colon"}))
    if len(parts) < 2 or any(not part for part in parts):
        return None
    clock = len(parts) == 2 and _CLOCK.fullmatch(latex) is not None
    return Ratio(tuple(parse(part) for part in parts), clock)


def _plus_minus(latex: str) -> Collection | None:
    if not re.search(r"\\[pm][pm](?![A-Za-z])", latex):
        return None
    upper = re.sub(r"\\mp(?![A-Za-z])", "-", re.sub(r"\\pm(?![A-Za-z])", "+", latex))
    lower = re.sub(r"\\mp(?![A-Za-z])", "+", re.sub(r"\\pm(?![A-Za-z])", "-", latex))
    return Collection((parse(upper.lstrip("+ ")), parse(lower.lstrip("+ "))))


def _flatten(parts: list[Node]) -> tuple[Node, ...]:
    r"""Flattens lists in a list: `1 \pm 2, 3` has three parts."""
    flat: list[Node] = []
    for part in parts:
        if isinstance(part, Collection) and not part.braces:
            flat.extend(part.parts)
        else:
            flat.append(part)
    return tuple(flat)


def parse_list(latex: str) -> Collection | Bracketed | None:
    """Reads a list such as `a, b and c` outside of brackets."""
    tokens = tokens_of(latex)
    spans: list[tuple[int, int]] = [token.span() for token, depth in tokens if depth == 0 and token[0] in ",;"]
    depth_at = {token.start(): depth for token, depth in tokens}
    alternative = False
    for match in _WORD_SEPARATOR.finditer(latex):
        if depth_at.get(match.start()) == 0:
            spans.append(match.span())
            alternative |= "or" in (match[1], match[2])
    if not spans:
        return None
    parts, position = [], 0
    for start, end in sorted(spans):
        parts.append(latex[position:start].strip())
        position = end
    parts.append(latex[position:].strip())
    parts = [part for part in parts if part]
    if len(parts) < 2:
        return None
    if all(part.startswith(label) for part, label in zip(parts, ("(1)", "(2)", "(3)", "(4)"), strict=False)):
        return Bracketed(tuple(parse(part[3:]) for part in parts), "(", ")")
    return Collection(_flatten([parse(part) for part in parts]), alternative=alternative)


_CONNECTIVES = (("\\lor", "or"), ("\\land", "and"))
_SET_OPERATORS = (("\\cup", "union"), ("\\setminus", "difference"), ("\\cap", "intersection"))


def _set_operation(latex: str) -> SetOperation | None:
    return _operation(latex, _SET_OPERATORS)


def _connective(latex: str) -> SetOperation | Collection | None:
    """Reads statements joined by connectives, which bind less than relations; set operators bind more."""
    node = _operation(latex, _CONNECTIVES)
    if node is not None and node.operator == "or" and all(_is_equation(part) for part in node.parts):
        return Collection(node.parts, alternative=True)
    return node


def _is_equation(node: Node) -> bool:
    return isinstance(node, Relation) and node.operators == ("=",)


def _operation(latex: str, operators: tuple[tuple[str, str], ...]) -> SetOperation | None:
    for operator, name in operators:
        parts = split_top(latex, frozenset({operator}))
        if len(parts) > 1 and all(parts):
            return SetOperation(name, tuple(parse(part) for part in parts))
    return None


_PART_OF_QUANTITY = (
    r"(-?\d[\d.,]*(?:\s*\\frac\s*\{\d+\}\s*\{\d+\})?)\s*(\\text\s*\{[A-Za-z. ]+\}|\\degree|'{1,2}|(?<=\s)[A-Za-z]{2,})"
)
_COMPOUND = re.compile(
    rf"{_PART_OF_QUANTITY}(?:\s*(?:and|\\text\s*\{{\s*,?\s*and\s*\}})?\s*{_PART_OF_QUANTITY}){{1,3}}"
)


def _compound(latex: str) -> Bracketed | None:
    """Reads several quantities that are one together, such as `3 hours 20 minutes`."""
    latex = re.sub(r"\s+and\s*\}", "}", latex)
    if _COMPOUND.fullmatch(latex) is None:
        return None
    parts = tuple(_leaf(rf"{number}\text{{{_MARKS.get(unit, unit)}}}" if "\\" not in unit else number + unit)
                  for number, unit in re.findall(_PART_OF_QUANTITY, latex))  # fmt: skip
    is_one = len({part.unit for part in parts}) == len(parts) and all(p.unit and p.value is not None for p in parts)
    return Bracketed(parts, "quantity", "quantity") if is_one else None


_MARKS = {"'": "feet", "''": "inches"}


def _leaf(latex: str) -> Leaf:
    expression, unit, percent = split_unit(latex)
    value = parse_rational(expression)
    if value is None:
        value = parse_word_number(expression)
    return Leaf(expression, value, unit, percent)


def parse(latex: str) -> Node:
    """Returns the structure of a normalised answer whose depth was checked."""
    latex = latex.strip()
    if latex.startswith("{") and matching_brace(latex, 0) == len(latex) - 1:
        inside = latex[1:-1].strip()
        if len(split_top(inside, frozenset(",;"))) > 1:
            return _set_of(inside)
        return parse(inside)
    leaf = _leaf(latex)
    if leaf.value is not None:
        return leaf
    if compound := _compound(latex):
        return compound
    if latex == "\\emptyset":
        return Collection((), braces=True)
    for reader in (
        _words,
        _all_but,
        _system,
        _matrix,
        _transposed,
        _based,
        _bracketed,
        _point,
        parse_list,
        _connective,
        _split_relation,
        _set_operation,
        _ratio,
        _plus_minus,
    ):
        node = reader(latex)
        if node is not None:
            return node
    return _leaf(latex)
