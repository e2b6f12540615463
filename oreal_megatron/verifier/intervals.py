"""Subsets of the real line: intervals, inequalities, unions, differences, compared as sets of points."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from oreal_megatron.verifier.naming import is_name
from oreal_megatron.verifier.outcome import Outcome, all_of, different
from oreal_megatron.verifier.structure import Bracketed, Collection, Leaf, Node, Relation, SetOperation

if TYPE_CHECKING:
    from oreal_megatron.verifier.compare import Comparison

_INFINITE = {"\\infty": 1, "+\\infty": 1, "-\\infty": -1}


_REALS = re.compile(r"\\mathbb\s*\{?\s*R\s*\}?")
_POSITIVE = re.compile(r"\\mathbb\s*\{?\s*R\s*\}?\s*\^\s*\{?\s*\+\s*\}?")


@dataclass(frozen=True)
class End:
    """One end of an interval: an infinity, or an expression; and whether the end belongs to the interval."""

    latex: str
    closed: bool

    @property
    def infinite(self) -> int:
        """-1 or 1 for an infinity, else 0."""
        return _INFINITE.get(self.latex.replace(" ", ""), 0)


@dataclass(frozen=True)
class Piece:
    low: End
    high: End


def _end(node: Node, closed: bool) -> End | None:
    if not isinstance(node, Leaf):
        return None
    end = End(node.latex, closed)
    return End(node.latex, False) if end.infinite else end


def is_set_like(node: Node) -> bool:
    """Whether the node can only be a set of reals: an inequality, a union, a half-open interval."""
    if isinstance(node, Relation):
        return bool(set(node.operators) & {"<", ">", "<=", ">=", "!=", "in"})
    if isinstance(node, SetOperation):
        return True
    if isinstance(node, Bracketed):
        return (node.opening, node.closing) in (("(", "]"), ("[", ")")) or any(
            isinstance(part, Leaf) and End(part.latex, False).infinite for part in node.parts
        )
    if isinstance(node, Collection):
        return any(isinstance(part, Relation) and is_set_like(part) for part in node.parts)
    return isinstance(node, Leaf) and (_REALS.fullmatch(node.latex) or _POSITIVE.fullmatch(node.latex)) is not None


class IntervalComparison:
    """Compares two nodes as sets of reals, where both can be read so."""

    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison

    def compare(self, gold: Node, answer: Node) -> Outcome | None:
        """The outcome, or None where one of the two is no set of reals."""
        gold_pieces, answer_pieces = self.pieces(gold), self.pieces(answer)
        if gold_pieces is None or answer_pieces is None:
            return None
        gold_pieces, answer_pieces = self._merged(gold_pieces), self._merged(answer_pieces)
        if len(gold_pieces) != len(answer_pieces):
            return different("different numbers of intervals")
        return all_of(map(self._same_piece, gold_pieces, answer_pieces), "the same set of reals")

    def _same_piece(self, gold: Piece, answer: Piece) -> Outcome:
        return all_of(
            (self._same_end(g, a) for g, a in ((gold.low, answer.low), (gold.high, answer.high))), "the same interval"
        )

    def _same_end(self, gold: End, answer: End) -> Outcome:
        if gold.infinite != answer.infinite:
            return different("different ends")
        if gold.closed != answer.closed:
            return different("an end is open on one side and closed on the other")
        if gold.infinite:
            return all_of((), "both infinite")
        return self.comparison.leaves.equal(gold.latex, answer.latex)

    def pieces(self, node: Node) -> list[Piece] | None:
        """The intervals that make up the node, in any order; None where it is not made of intervals."""
        if isinstance(node, Bracketed):
            return self._interval(node)
        if isinstance(node, Leaf):
            if _REALS.fullmatch(node.latex):
                return [_everything()]
            return [Piece(End("0", False), _everything().high)] if _POSITIVE.fullmatch(node.latex) else None
        if isinstance(node, Relation):
            return self._relation(node)
        if isinstance(node, Collection):
            if node.braces:
                points = [_end(part, True) for part in node.parts]
                return None if any(p is None or p.infinite for p in points) else [Piece(p, p) for p in points if p]
            return self._solutions(node)
        if isinstance(node, SetOperation):
            parts = [self.pieces(part) for part in node.parts]
            if node.operator == "union":
                return self._joined(parts)
            if node.operator == "difference" and len(parts) == 2 and parts[0] is not None and parts[1] is not None:
                return self._without_points(parts[0], parts[1])
        return None

    def _solutions(self, node: Collection) -> list[Piece] | None:
        """Inequalities side by side: both hold, where they can; joined by "or", either does."""
        if not all(isinstance(part, (Relation, Bracketed, SetOperation)) for part in node.parts):
            return None
        parts = [self.pieces(part) for part in node.parts]
        union = self._joined(parts)
        rays = [part[0] for part in parts if part is not None and len(part) == 1]
        if (
            node.alternative
            or len(rays) != 2
            or len(parts) != 2
            or not all(isinstance(p, Relation) for p in node.parts)
        ):
            return union
        low = next((ray.low for ray in rays if not ray.low.infinite), None)
        high = next((ray.high for ray in rays if not ray.high.infinite), None)
        if low is None or high is None or any(not ray.low.infinite and not ray.high.infinite for ray in rays):
            return union
        first, last = self._order(low), self._order(high)
        return [Piece(low, high)] if first is not None and last is not None and first < last else union

    @staticmethod
    def _joined(parts: list[list[Piece] | None]) -> list[Piece] | None:
        joined: list[Piece] = []
        for part in parts:
            if part is None:
                return None
            joined.extend(part)
        return joined

    @staticmethod
    def _interval(node: Bracketed) -> list[Piece] | None:
        if len(node.parts) != 2 or node.opening not in ("(", "[") or node.closing not in (")", "]"):
            return None
        low, high = _end(node.parts[0], node.opening == "["), _end(node.parts[1], node.closing == "]")
        return None if low is None or high is None else [Piece(low, high)]

    def _relation(self, node: Relation) -> list[Piece] | None:
        if node.operators == ("in",):
            return self.pieces(node.items[1])
        if len(node.items) == 2:
            items, operator = node.items, node.operators[0]
            if not is_name(items[0]) and is_name(items[1]):
                items, operator = items[::-1], {"<": ">", ">": "<", "<=": ">=", ">=": "<="}.get(operator, operator)
            if not is_name(items[0]):
                return None
            end = _end(items[1], operator in ("<=", ">="))
            if end is None or end.infinite:
                return None
            if operator == "!=":
                return [Piece(_everything().low, end), Piece(end, _everything().high)]
            if operator in ("<", "<="):
                return [Piece(_everything().low, end)]
            return [Piece(end, _everything().high)] if operator in (">", ">=") else None
        if len(node.items) == 3 and is_name(node.items[1]):
            low, high, operators = node.items[0], node.items[2], node.operators
            if set(operators) <= {">", ">="}:
                low, high, operators = high, low, operators[::-1]
                operators = tuple({">": "<", ">=": "<="}[operator] for operator in operators)
            if set(operators) <= {"<", "<="}:
                first, last = _end(low, operators[0] == "<="), _end(high, operators[1] == "<=")
                return None if first is None or last is None else [Piece(first, last)]
        return None

    def _order(self, end: End) -> Any:
        if end.infinite:
            return float("inf") * end.infinite
        return self.comparison.leaves.real_value(end.latex)

    def _merged(self, pieces: list[Piece]) -> list[Piece]:
        """Sorted, with touching pieces joined; as given where an end has no numeric value."""
        if len(pieces) < 2:
            return pieces
        keyed = [(self._order(piece.low), self._order(piece.high), piece) for piece in pieces]
        if any(low is None or high is None for low, high, _ in keyed):
            return pieces
        keyed.sort(key=lambda entry: (entry[0], not entry[2].low.closed))
        merged = [keyed[0]]
        for low, high, piece in keyed[1:]:
            last_low, last_high, last = merged[-1]
            if low < last_high or (low == last_high and (piece.low.closed or last.high.closed)):
                if high > last_high or (high == last_high and piece.high.closed):
                    merged[-1] = (last_low, high, Piece(last.low, piece.high))
            else:
                merged.append((low, high, piece))
        return [piece for _, _, piece in merged]

    def _without_points(self, pieces: list[Piece], removed: list[Piece]) -> list[Piece] | None:
        """Real numbers without single points."""
        if len(pieces) != 1 or any(piece.low != piece.high for piece in removed):
            return None
        values = sorted(((self._order(piece.low), piece.low.latex) for piece in removed), key=lambda entry: entry[0])
        cuts = [End(latex, False) for _, latex in values]
        ends = [pieces[0].low, *(cut for cut in cuts for _ in range(2)), pieces[0].high]
        return [Piece(ends[i], ends[i + 1]) for i in range(0, len(ends), 2)]


def _everything() -> Piece:
    return Piece(End("-\\infty", False), End("\\infty", False))
