"""Subsets of the real line: intervals, inequalities, unions, differences, compared as sets of points."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from oreal_megatron.verifier.latex.nodes import Bracketed, Collection, Leaf, Node, Relation, SetOperation
from oreal_megatron.verifier.latex.variable_names import is_name
from oreal_megatron.verifier.outcome import Outcome, all_of, different

if TYPE_CHECKING:
    from oreal_megatron.verifier.equality.compare import AnswerComparison

_INFINITE = {"\\infty": 1, "+\\infty": 1, "-\\infty": -1}


_REALS = re.compile(r"\\mathbb\s*\{?\s*R\s*\}?")
_DISTANCE = re.compile(r"\|\s*[A-Za-z]\s*(?:([+-])\s*([^|<>=A-Za-z]{1,60}))?\|")
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
class IntervalPiece:
    low: End
    high: End


def _end(node: Node, closed: bool) -> End | None:
    if not isinstance(node, Leaf):
        return None
    end = End(node.latex, closed)
    return End(node.latex, False) if end.infinite else end


def _distance(node: Node) -> str | None:
    r"""What `|x-3|` measures the distance to: `(3)`, and an empty text for `|x|`; None of anything else."""
    match = _DISTANCE.fullmatch(node.latex) if isinstance(node, Leaf) else None
    if match is None:
        return None
    return "" if match[1] is None else f"{'' if match[1] == '-' else '-'}({match[2].strip()})"


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

    def __init__(self, comparison: AnswerComparison) -> None:
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

    def _same_piece(self, gold: IntervalPiece, answer: IntervalPiece) -> Outcome:
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

    def pieces(self, node: Node) -> list[IntervalPiece] | None:
        """The intervals that make up the node, in any order; None where it is not made of intervals."""
        if isinstance(node, Bracketed):
            return self._interval(node)
        if isinstance(node, Leaf):
            if _REALS.fullmatch(node.latex):
                return [_everything()]
            return [IntervalPiece(End("0", False), _everything().high)] if _POSITIVE.fullmatch(node.latex) else None
        if isinstance(node, Relation):
            return self._relation(node)
        if isinstance(node, Collection):
            if node.braces:
                points = [_end(part, True) for part in node.parts]
                return (
                    None if any(p is None or p.infinite for p in points) else [IntervalPiece(p, p) for p in points if p]
                )
            return self._solutions(node)
        if isinstance(node, SetOperation):
            if node.operator in ("or", "and"):
                return self._solutions(Collection(node.parts, alternative=node.operator == "or"))
            parts = [self.pieces(part) for part in node.parts]
            if node.operator == "union":
                return self._joined(parts)
            if node.operator == "difference" and len(parts) == 2 and parts[0] is not None and parts[1] is not None:
                return self._without_points(parts[0], parts[1])
        return None

    def _solutions(self, node: Collection) -> list[IntervalPiece] | None:
        """Inequalities side by side: both hold, where they can; joined by "or", either does."""
        if not all(isinstance(part, (Relation, Bracketed, SetOperation)) for part in node.parts):
            return None
        excluded = [part for part in node.parts if isinstance(part, Relation) and part.operators == ("!=",)]
        if excluded and not node.alternative and len(excluded) < len(node.parts):
            # -1 <= x <= 1, x != 0
            kept = self.pieces(replace(node, parts=tuple(part for part in node.parts if part not in excluded)))
            points = [_end(part.items[1], True) for part in excluded if len(part.items) == 2 and is_name(part.items[0])]
            if kept is None or len(points) < len(excluded) or any(end is None or end.infinite for end in points):
                return None
            return self._without_points(kept, [IntervalPiece(end, end) for end in points if end is not None])
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
        return [IntervalPiece(low, high)] if first is not None and last is not None and first < last else union

    @staticmethod
    def _joined(parts: list[list[IntervalPiece] | None]) -> list[IntervalPiece] | None:
        joined: list[IntervalPiece] = []
        for part in parts:
            if part is None:
                return None
            joined.extend(part)
        return joined

    @staticmethod
    def _interval(node: Bracketed) -> list[IntervalPiece] | None:
        if len(node.parts) != 2 or node.opening not in ("(", "[") or node.closing not in (")", "]"):
            return None
        low, high = _end(node.parts[0], node.opening == "["), _end(node.parts[1], node.closing == "]")
        return None if low is None or high is None else [IntervalPiece(low, high)]

    def _relation(self, node: Relation) -> list[IntervalPiece] | None:
        if node.operators == ("in",):
            return self.pieces(node.items[1])
        if len(node.items) == 2:
            items, operator = node.items, node.operators[0]
            if (around := _distance(items[0])) is not None:
                return self._within(around, items[1], operator)
            if not is_name(items[0]) and is_name(items[1]):
                items, operator = items[::-1], {"<": ">", ">": "<", "<=": ">=", ">=": "<="}.get(operator, operator)
            if not is_name(items[0]):
                return None
            end = _end(items[1], operator in ("<=", ">="))
            if end is None or end.infinite:
                return None
            if operator == "!=":
                return [IntervalPiece(_everything().low, end), IntervalPiece(end, _everything().high)]
            if operator in ("<", "<="):
                return [IntervalPiece(_everything().low, end)]
            return [IntervalPiece(end, _everything().high)] if operator in (">", ">=") else None
        if len(node.items) == 3 and is_name(node.items[1]):
            low, high, operators = node.items[0], node.items[2], node.operators
            if set(operators) <= {">", ">="}:
                low, high, operators = high, low, operators[::-1]
                operators = tuple({">": "<", ">=": "<="}[operator] for operator in operators)
            if set(operators) <= {"<", "<="}:
                first, last = _end(low, operators[0] == "<="), _end(high, operators[1] == "<=")
                return None if first is None or last is None else [IntervalPiece(first, last)]
        return None

    def _within(self, around: str, radius: Node, operator: str) -> list[IntervalPiece] | None:
        """`|x-3|<2` is (1,5), `|x-3|>2` what lies beyond."""
        far = self._order(end) if (end := _end(radius, operator in ("<=", ">="))) is not None else None
        if end is None or far is None or not 0 < far < float("inf"):
            return None
        low, high = (
            End(f"{around}{sign}({end.latex})" if around else f"{sign}({end.latex})", end.closed) for sign in "-+"
        )
        if operator in ("<", "<="):
            return [IntervalPiece(low, high)]
        everything = _everything()
        return (
            [IntervalPiece(everything.low, low), IntervalPiece(high, everything.high)]
            if operator in (">", ">=")
            else None
        )

    def _order(self, end: End) -> Any:
        if end.infinite:
            return float("inf") * end.infinite
        return self.comparison.leaves.real_value(end.latex)

    def _merged(self, pieces: list[IntervalPiece]) -> list[IntervalPiece]:
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
                    merged[-1] = (last_low, high, IntervalPiece(last.low, piece.high))
            else:
                merged.append((low, high, piece))
        return [piece for _, _, piece in merged]

    def _without_points(self, pieces: list[IntervalPiece], removed: list[IntervalPiece]) -> list[IntervalPiece] | None:
        """Intervals without single points; None where an order is not known."""
        for point in removed:
            place = self._order(point.low)
            if point.low != point.high or place is None:
                return None
            cut, rest = End(point.low.latex, False), []
            for piece in pieces:
                low, high = self._order(piece.low), self._order(piece.high)
                if low is None or high is None:
                    return None
                if low < place < high:
                    rest += [IntervalPiece(piece.low, cut), IntervalPiece(cut, piece.high)]
                elif place in (low, high) and low < high:
                    rest.append(IntervalPiece(cut if place == low else piece.low, cut if place == high else piece.high))
                elif not low == place == high:
                    rest.append(piece)
            pieces = rest
        return pieces


def _everything() -> IntervalPiece:
    return IntervalPiece(End("-\\infty", False), End("\\infty", False))
