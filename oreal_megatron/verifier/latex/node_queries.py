"""Questions about parsed answers: their parts, names and brackets."""

from __future__ import annotations

import re

from oreal_megatron.verifier.equality.intervals import is_set_like
from oreal_megatron.verifier.latex.nodes import Bracketed, Collection, Leaf, Matrix, Node, Ratio, Relation, Text


def latex_of(node: Node) -> str | None:
    """The text of a node without parts."""
    if isinstance(node, Leaf):
        return node.latex
    if isinstance(node, Text):
        return node.latex
    return None


def names_of(node: Node) -> list[str]:
    """The names in a tuple of names."""
    latex = [latex_of(part) for part in node.parts] if isinstance(node, Bracketed) else []
    return [name for name in latex if name is not None]


def words_of(node: Node) -> str | None:
    """What a node says in words, if anything: the empty set says "no solution"."""
    if isinstance(node, Text):
        return node.words
    if isinstance(node, Leaf) and node.value is None:
        return {"\\emptyset": "no solution", "\\infty": "infinity"}.get(node.latex, node.latex)
    if isinstance(node, Collection) and node.braces and not node.parts:
        return "no solution"
    return None


def parts_of(node: Node) -> tuple[Node, ...] | None:
    """The parts in order; of a matrix only where it is one row or one column."""
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


def is_interval(node: Bracketed) -> bool:
    """Brackets of two parts that are no tuple's."""
    return len(node.parts) == 2 and ((node.opening, node.closing) not in _TUPLE_BRACKETS or is_set_like(node))


_TUPLE_BRACKETS = {("(", ")"), ("\\langle", "\\rangle")}


def quotient_of(ratio: Ratio, index: int) -> str:
    """The first part of a ratio over another one, as LaTeX."""
    return f"\\frac{{{latex_of(ratio.parts[0]) or ''}}}{{{latex_of(ratio.parts[index]) or ''}}}"


REVERSIBLE = frozenset({"=", "!=", "~", "<", ">", "<=", ">="})
_FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}


def reversed_relation(relation: Relation) -> tuple[tuple[Node, ...], tuple[str, ...]]:
    """Items and operators of the relation read from right to left."""
    return relation.items[::-1], tuple(_FLIPPED.get(operator, operator) for operator in relation.operators[::-1])


_SUM_OF_NAMES = re.compile(
    r"(?:[A-Za-z](?:_\{?\w\}?)?\s*(?:[-+*/]|\\cdot|\\times)?\s*){2,8}|\\frac\s*\{\s*[A-Za-z]\s*\}\s*\{\s*[A-Za-z]\s*\}"
)


def is_measured(relation: Relation) -> bool:
    """`m+n=7`: the value of an expression in several unknowns. Whether it was asked for, the answer does not say."""
    name = latex_of(relation.items[0]) or ""
    return (
        relation.operators == ("=",)
        and _SUM_OF_NAMES.fullmatch(name) is not None
        and len(set(re.findall("[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", name)))) > 1
    )


_ALPHABET = "abcdefghijklmnopqrstuvwxyz"


def in_alphabet(named: dict[str, Node]) -> dict[str, Node]:
    """`y=1, x=2` as x, y: neighbours in the alphabet have an order of their own; other names keep the given one."""
    names = sorted(named)
    return {name: named[name] for name in names} if "".join(names) in _ALPHABET else named


def modulus_of(relation: Relation) -> str | None:
    """The modulus of a congruence."""
    if "mod" not in relation.operators:
        return None
    found = re.search(r"\\pmod\s*\{?\s*(\w+)|\\mod\s*\{?\s*(\w+)", latex_of(relation.items[-1]) or "")
    return (found[1] or found[2]) if found else None


NUMBER_SET = re.compile(r"\\mathbb\s*\{?\s*[A-Z]\s*\}?(?:\s*\^\s*\{?[+*-]\}?)?")
_CALL = re.compile(r"([A-Za-z])\s*\(\s*([A-Za-z])\s*\)")


def rename_argument(answer_name: str, gold_name: str, value: Node) -> Node | None:
    """`t^2` of `f(t)=t^2` in the gold's own variable: the argument of a function is bound."""
    given, wanted = _CALL.fullmatch(answer_name), _CALL.fullmatch(gold_name)
    if not (given and wanted and given[1] == wanted[1] and isinstance(value, Leaf)):
        return None
    latex = re.sub(rf"(?<![\\A-Za-z]){given[2]}(?![A-Za-z])", lambda _: wanted[2], value.latex)
    return Leaf(latex, value.value, value.unit, value.percent)
