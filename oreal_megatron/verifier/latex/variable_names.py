r"""Names in front of values: `x = 5`, `f(x) = ...`, `|AB| = 1`, `x \in ...`."""

from __future__ import annotations

import re

from oreal_megatron.verifier.latex.nodes import Bracketed, Collection, Leaf, Node, Ratio, Relation, Text
from oreal_megatron.verifier.latex.rational import parse_rational

_SUBSCRIPT = r"(?:\s*_\s*(?:\{[^{}]{1,20}\}|\w))?(?:\s*'{1,2}|\s*\^\s*\{?\s*\\prime\s*\}?|\s*\^\s*\{?\s*\\?\*\s*\}?)?"
_GREEK = r"\\(?:alpha|beta|gamma|delta|epsilon|theta|lambda|mu|phi|rho|sigma|tau|omega|Delta|Omega|ell)"
_SYMBOL = rf"(?:[A-Za-z]|{_GREEK}){_SUBSCRIPT}"
_SEGMENT = r"[A-Z]{2,6}"
_NAME = re.compile(
    rf"\{{?\s*{_SYMBOL}\s*\}}?"
    rf"|(?:{_SYMBOL}|\\mathbb\s*\{{?\s*[PE]\s*\}}?|\\Pr)\s*[(\[][^()\[\]]{{1,40}}[)\]]"
    r"|[fghFGHT]\s*(?:\^\s*\{\s*-1\s*\}|_\s*\w)?\s*\((?:[^()]|\([^()]*\)){1,60}\)"
    r"|\[\s*[A-Z]{3,6}\s*\]|m\s*\\angle\s*\{?[A-Z]{1,3}\}?|\\text\s*\{[^{}]{1,60}\}\s*\\?[A-Za-z]+(?:\s*[A-Z]{1,4})?"
    r"|\\(?:lim|int|max|min|sup|inf)(?![A-Za-z]).{0,120}"
    rf"|(?:\|\s*)?{_SEGMENT}(?:\s*\|)?"
    rf"|\\(?:angle|triangle|overline|vec|overrightarrow|hat|bar)\s*\{{?\s*[A-Za-z]{{1,6}}\s*\}}?"
    r"|\\frac\s*\{\s*d\s*[a-zA-Z]?\s*\}\s*\{\s*d\s*[a-zA-Z]\s*\}|\\(?:det|dim|deg)\s*\(?\s*[A-Za-z]\s*\)?"
    rf"|\\frac\s*\{{\s*{_SEGMENT}\s*\}}\s*\{{\s*{_SEGMENT}\s*\}}|{_SEGMENT}\s*/\s*{_SEGMENT}"
    rf"|\\(?:sin|cos|tan|cot|sec|csc)\s*(?:\\angle\s*)?\{{?[A-Z]{{1,3}}\}}?"
    r"|\\text\s*\{[^{}]{1,60}\}(?:\s*_\s*\{[^{}]{1,20}\})?"
)


def is_name(node: Node) -> bool:
    """Whether the item is only a name for the other side of the relation."""
    if isinstance(node, Leaf):
        return node.value is None and node.unit is None and _NAME.fullmatch(node.latex) is not None
    if isinstance(node, Text):
        return re.search(r"\d", node.words) is None and len(node.words) <= 80
    if isinstance(node, Ratio):
        return all(isinstance(part, Leaf) and part.value is None and _NAME.fullmatch(part.latex) for part in node.parts)
    if isinstance(node, (Bracketed, Collection)):
        return bool(node.parts) and all(is_name(part) for part in node.parts)
    return False


def strip_name(relation: Relation) -> Node | None:
    """Returns the value that a relation gives to a name, or None if it is an equation or inequality of its own."""
    if set(relation.operators) - {"=", "~", "in", "mod"}:
        return None
    items = list(relation.items)
    if relation.operators == ("mod",):
        residue = items[1]
        if is_name(items[0]) and isinstance(residue, Leaf):
            return _leaf_without_modulus(residue)
        return None
    named = [is_name(item) for item in items]
    if named[0] and len(items) == 2:
        return items[1]
    if named[-1] and len(items) == 2 and relation.operators == ("=",):
        return items[0]
    rest = [item for item, is_a_name in zip(items, named, strict=True) if not is_a_name]
    if named[0] and rest:
        return _chain_value(rest, relation.operators[len(items) - len(rest) :])
    if not any(named) and all(is_constant(item) for item in items):
        return _chain_value(items, relation.operators)
    return None


def _chain_value(items: list[Node], operators: tuple[str, ...]) -> Node:
    """Returns the exact value of a chain: the last item before an approximation."""
    for index, operator in enumerate(operators[: len(items) - 1]):
        if operator == "~":
            return items[index]
    return items[-1]


def is_constant(node: Node) -> bool:
    """Whether the item is an expression without variables."""
    if not isinstance(node, Leaf):
        return False
    letters = re.sub(
        r"\\(?:frac|sqrt|pi|cdot|times|div|ln|log|sin|cos|tan|binom|degree|text|infty)(?![A-Za-z])", " ", node.latex
    )
    return not re.search(r"[A-Za-df-hj-z]|\\[a-z]", letters)


def _leaf_without_modulus(leaf: Leaf) -> Leaf:
    latex = re.split(r"\(?\s*\\(?:pmod|mod|text\s*\{\s*\(?mod)", leaf.latex)[0].strip().rstrip("(").strip()
    return Leaf(latex, parse_rational(latex))


def named_parts(node: Node) -> dict[str, Node] | None:
    """Returns name -> value if every part of a list names its own value and all names differ, else None."""
    if not isinstance(node, (Collection, Bracketed)):
        return None
    named: dict[str, Node] = {}
    for part in node.parts:
        if not isinstance(part, Relation) or not isinstance(part.items[0], (Leaf, Text)):
            return None
        value = strip_name(part)
        name = part.items[0].latex.replace(" ", "")
        if value is None or name in named:
            return None
        named[name] = value
    return named or None
