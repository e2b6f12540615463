"""Properties of parsed answers: their parts, names and brackets."""

from __future__ import annotations

import re
from fractions import Fraction

from oreal_megatron.verifier.latex.nodes import (
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
from oreal_megatron.verifier.latex.rational import parse_rational


def latex_of(node: Node) -> str | None:
    """Returns the LaTeX of a node that has no parts, else None."""
    if isinstance(node, Leaf):
        return node.latex
    if isinstance(node, Text):
        return node.latex
    return None


def names_of(node: Node) -> list[str]:
    """Returns the names in a tuple of names."""
    latex = [latex_of(part) for part in node.parts] if isinstance(node, Bracketed) else []
    return [name for name in latex if name is not None]


def words_of(node: Node) -> str | None:
    """Returns the words that a node stands for, or None: the empty set stands for "no solution"."""
    if isinstance(node, Text):
        return node.words
    if isinstance(node, Leaf) and node.value is None:
        return {"\\emptyset": "no solution", "\\infty": "infinity"}.get(node.latex, node.latex)
    if isinstance(node, Collection) and node.braces and not node.parts:
        return "no solution"
    return None


def parts_of(node: Node) -> tuple[Node, ...] | None:
    """Returns the parts in order; those of a matrix only if it has one row or one column."""
    if isinstance(node, (Collection, Bracketed)):
        return node.parts
    if isinstance(node, Matrix):
        if len(node.rows) == 1:
            return node.rows[0]
        if len(node.rows[0]) == 1:
            return tuple(row[0] for row in node.rows)
    return None


def is_braced(node: Node) -> bool:
    """Whether the node is a set in braces."""
    return isinstance(node, Collection) and node.braces


REALS = re.compile(r"\\mathbb\s*\{?\s*R\s*\}?")
POSITIVE_REALS = re.compile(r"\\mathbb\s*\{?\s*R\s*\}?\s*\^\s*\{?\s*\+\s*\}?")


def infinity_sign(latex: str) -> int:
    """Returns -1 or 1 for an infinity, and 0 for every other expression."""
    return {"\\infty": 1, "+\\infty": 1, "-\\infty": -1}.get(latex.replace(" ", ""), 0)


def is_set_like(node: Node) -> bool:
    """Whether the node can only be a set of reals: an inequality, a union, a half-open interval."""
    if isinstance(node, Relation):
        return bool(set(node.operators) & {"<", ">", "<=", ">=", "!=", "in"})
    if isinstance(node, SetOperation):
        return True
    if isinstance(node, Bracketed):
        return (node.opening, node.closing) in (("(", "]"), ("[", ")")) or any(
            isinstance(part, Leaf) and infinity_sign(part.latex) for part in node.parts
        )
    if isinstance(node, Collection):
        return any(isinstance(part, Relation) and is_set_like(part) for part in node.parts)
    return isinstance(node, Leaf) and (REALS.fullmatch(node.latex) or POSITIVE_REALS.fullmatch(node.latex)) is not None


def is_interval(node: Bracketed) -> bool:
    """Whether two parts in brackets are an interval: the brackets are no tuple's, or an end is infinite."""
    return len(node.parts) == 2 and ((node.opening, node.closing) not in _TUPLE_BRACKETS or is_set_like(node))


_TUPLE_BRACKETS = {("(", ")"), ("\\langle", "\\rangle")}


def quotient_of(ratio: Ratio, index: int) -> str:
    """Returns the first part of a ratio over the part at `index`, as LaTeX."""
    return f"\\frac{{{latex_of(ratio.parts[0]) or ''}}}{{{latex_of(ratio.parts[index]) or ''}}}"


REVERSIBLE = frozenset({"=", "!=", "~", "<", ">", "<=", ">="})
_FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}


def reversed_relation(relation: Relation) -> tuple[tuple[Node, ...], tuple[str, ...]]:
    """Returns items and operators of the relation read from right to left."""
    return relation.items[::-1], tuple(_FLIPPED.get(operator, operator) for operator in relation.operators[::-1])


_SUM_OF_NAMES = re.compile(
    r"(?:[A-Za-z](?:_\{?\w\}?)?\s*(?:[-+*/]|\\cdot|\\times)?\s*){2,8}|\\frac\s*\{\s*[A-Za-z]\s*\}\s*\{\s*[A-Za-z]\s*\}"
)


def is_measured(relation: Relation) -> bool:
    """Whether the relation is the value of an expression in several unknowns, such as `m+n=7`.

    The answer does not say whether that expression was asked for.
    """
    name = latex_of(relation.items[0]) or ""
    return (
        relation.operators == ("=",)
        and _SUM_OF_NAMES.fullmatch(name) is not None
        and len(set(re.findall("[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", name)))) > 1
    )


_OPERAND = re.compile(r"[A-Za-z](?:_\{?\w\}?)?|\d+(?:\.\d+)?")


def is_computed_sum(relation: Relation) -> bool:
    """Whether a chain such as `m+n=256+37=293` puts numbers for the names of a sum and computes it."""
    if set(relation.operators) != {"="} or len(relation.items) < 3:
        return False
    name, numbers = latex_of(relation.items[0]) or "", latex_of(relation.items[1]) or ""
    shapes = [_OPERAND.sub("#", text).replace(" ", "") for text in (name, numbers)]
    return _SUM_OF_NAMES.fullmatch(name) is not None and shapes[0] == shapes[1] and not re.search("[A-Za-z]", numbers)


_INDEXED = re.compile(r"([A-Za-z]|\\[A-Za-z]+)_\{?\d\}?")


def are_indexed_roots(named: dict[str, Node]) -> bool:
    """Whether all names are one letter with different indices, as in `x_1=2, x_2=-3`; their order is free."""
    letters = {match[1] if (match := _INDEXED.fullmatch(name)) else None for name in named}
    return len(letters) == 1 and None not in letters and len(named) > 1


_SIZES = {
    "s": (1, "time"), "min": (60, "time"), "h": (3600, "time"), "day": (86_400, "time"), "week": (604_800, "time"),
    "in": (1, "length"), "ft": (12, "length"), "yd": (36, "length"), "mm": (1, "metric length"),
    "cm": (10, "metric length"), "m": (1_000, "metric length"), "km": (10**6, "metric length"), "mg": (1, "mass"),
    "g": (1_000, "mass"), "kg": (10**6, "mass"), "ml": (1, "volume"), "l": (1_000, "volume"), "cent": (1, "dollars"),
    "usd": (100, "dollars"),
}  # fmt: skip


def amount_of(node: Node) -> tuple[Fraction, str] | None:
    """Returns the total and the dimension of quantities such as `2 h 30 min`; None for other nodes."""
    parts = node.parts if isinstance(node, Bracketed) and node.opening == "quantity" else (node,)
    sizes = [
        (part.value, *_SIZES[part.unit.words[0]])
        for part in parts
        if isinstance(part, Leaf) and part.value is not None and part.unit is not None
        and len(part.unit.words) == 1 and part.unit.words[0] in _SIZES
    ]  # fmt: skip
    if len(sizes) < len(parts) or len({dimension for _, _, dimension in sizes}) > 1:
        return None
    return sum((value * size for value, size, _ in sizes), Fraction(0)), sizes[0][2]


_UNIT_LETTER = re.compile(r"(.*[\d})])\s*([mgshlLJNW])")


def with_unit_letter(answer: Leaf, gold: Leaf) -> Leaf:
    """Returns `12 h` as 12 hours if the gold answer has this unit; else the letter is a variable."""
    match = _UNIT_LETTER.fullmatch(answer.latex) if answer.unit is None and gold.unit is not None else None
    if match is None or gold.unit is None or gold.unit.words != (match[2].lower(),):
        return answer
    return Leaf(match[1], parse_rational(match[1]), gold.unit)


def same_time_of_day(gold: Ratio, answer: Ratio) -> bool:
    """Whether two clock times are the same, if at least one says a.m. or p.m.: 3:45 pm is 15:45."""
    times = []
    for clock in (gold, answer):
        hour, minute = clock.parts
        if not (
            isinstance(hour, Leaf) and isinstance(minute, Leaf) and hour.value is not None and minute.value is not None
        ):
            return False
        half = minute.unit.words[0] if minute.unit is not None and minute.unit.words else None
        times.append((hour.value, minute.value, half))
    if all(half is None for _, _, half in times) or times[0][1] != times[1][1]:
        return False
    hours = [value if half is None else value % 12 + 12 * (half == "pm") for value, _, half in times]
    return hours[0] == hours[1]


_ALPHABET = "abcdefghijklmnopqrstuvwxyz"


def in_alphabet(named: dict[str, Node]) -> dict[str, Node]:
    """Sorts `y=1, x=2` by name if the names are neighbours in the alphabet; leaves the order of other names."""
    names = sorted(named)
    return {name: named[name] for name in names} if "".join(names) in _ALPHABET else named


def modulus_of(relation: Relation) -> str | None:
    """Returns the modulus of a congruence, or None."""
    if "mod" not in relation.operators:
        return None
    found = re.search(r"\\pmod\s*\{?\s*(\w+)|\\mod\s*\{?\s*(\w+)", latex_of(relation.items[-1]) or "")
    return (found[1] or found[2]) if found else None


def is_reducible_residue(relation: Relation, value: Node) -> bool:
    """Whether a residue is not less than its modulus, as in `7 mod 2`, which rather stands for the residue 1."""
    modulus = modulus_of(relation)
    return (
        modulus is not None and modulus.isdigit() and isinstance(value, Leaf) and value.value is not None
        and value.value >= int(modulus)
    )  # fmt: skip


NUMBER_SET = re.compile(r"\\mathbb\s*\{?\s*[A-Z]\s*\}?(?:\s*\^\s*\{?[+*-]\}?)?")
_CALL = re.compile(r"([A-Za-z])\s*\(\s*([A-Za-z])\s*\)")


def rename_argument(answer_name: str, gold_name: str, value: Node) -> Node | None:
    """Returns `t^2` of `f(t)=t^2` in the variable of the gold answer, since the argument of a function is bound."""
    given, wanted = _CALL.fullmatch(answer_name), _CALL.fullmatch(gold_name)
    if not (given and wanted and given[1] == wanted[1] and isinstance(value, Leaf)):
        return None
    latex = re.sub(rf"(?<![\\A-Za-z]){given[2]}(?![A-Za-z])", lambda _: wanted[2], value.latex)
    return Leaf(latex, value.value, value.unit, value.percent)


def as_fraction(leaf: Leaf) -> Leaf:
    """Returns 28% as 28/100, and other leaves as they are."""
    if not leaf.percent:
        return leaf
    return Leaf(f"\\frac{{{leaf.latex}}}{{100}}", None if leaf.value is None else leaf.value / 100)
