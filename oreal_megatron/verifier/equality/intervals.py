"""Subsets of the real line: intervals, inequalities, unions, differences, compared as sets of points."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from oreal_megatron.verifier.equality.leaves import Leaves
from oreal_megatron.verifier.latex.node_queries import POSITIVE_REALS, REALS, infinity_sign
from oreal_megatron.verifier.latex.nodes import Bracketed, Collection, Leaf, Node, Relation, SetOperation
from oreal_megatron.verifier.latex.variable_names import is_name
from oreal_megatron.verifier.outcome import Outcome, all_of, different

_DISTANCE = re.compile(r"\|\s*[A-Za-z]\s*(?:([+-])\s*([^|<>=A-Za-z]{1,60}))?\|")


@dataclass(frozen=True)
class End:
    """An end of an interval: an infinity or an expression, and whether it belongs to the interval."""

    latex: str
    closed: bool

    @property
    def infinite(self) -> int:
        """-1 or 1 for an infinity, 0 for every other expression."""
        return infinity_sign(self.latex)


@dataclass(frozen=True)
class Interval:
    """The reals between two ends; a single point where both ends are the same."""

    low: End
    high: End


def _end(node: Node, closed: bool) -> End | None:
    if not isinstance(node, Leaf):
        return None
    end = End(node.latex, closed)
    return End(node.latex, False) if end.infinite else end


def _distance(node: Node) -> str | None:
    r"""Returns `(3)` for `|x-3|`, an empty text for `|x|`, and None for expressions that are no distance."""
    match = _DISTANCE.fullmatch(node.latex) if isinstance(node, Leaf) else None
    if match is None:
        return None
    return "" if match[1] is None else f"{'' if match[1] == '-' else '-'}({match[2].strip()})"


class IntervalComparison:
    """Compares two nodes as sets of reals, if both can be read so."""

    def __init__(self, leaves: Leaves) -> None:
        self.leaves = leaves

    def compare(self, gold: Node, answer: Node) -> Outcome | None:
        """Returns the outcome, or None if either node is no set of reals."""
        gold_pieces, answer_pieces = self.pieces(gold), self.pieces(answer)
        if gold_pieces is None or answer_pieces is None:
            return None
        gold_pieces, answer_pieces = self._merged(gold_pieces), self._merged(answer_pieces)
        if len(gold_pieces) != len(answer_pieces):
            return different("different numbers of intervals")
        return all_of(map(self._same_piece, gold_pieces, answer_pieces), "the same set of reals")

    def _same_piece(self, gold: Interval, answer: Interval) -> Outcome:
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
        return self.leaves.equal(gold.latex, answer.latex)

    def pieces(self, node: Node) -> list[Interval] | None:
        """Returns the intervals that make up the node, in any order; None if it is not made of intervals."""
        if isinstance(node, Bracketed):
            return self._interval(node)
        if isinstance(node, Leaf):
            if REALS.fullmatch(node.latex):
                return [_everything()]
            return [Interval(End("0", False), _everything().high)] if POSITIVE_REALS.fullmatch(node.latex) else None
        if isinstance(node, Relation):
            return self._relation(node)
        if isinstance(node, Collection):
            if node.braces:
                points = [_end(part, True) for part in node.parts]
                return None if any(p is None or p.infinite for p in points) else [Interval(p, p) for p in points if p]
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

    def _solutions(self, node: Collection) -> list[Interval] | None:
        """Returns the intersection of inequalities side by side if it is not empty; their union if "or" joins them."""
        if not all(isinstance(part, (Relation, Bracketed, SetOperation)) for part in node.parts):
            return None
        excluded = [part for part in node.parts if isinstance(part, Relation) and part.operators == ("!=",)]
        if excluded and not node.alternative and len(excluded) < len(node.parts):
            # -1 <= x <= 1, x != 0
            kept = self.pieces(replace(node, parts=tuple(part for part in node.parts if part not in excluded)))
            points = [_end(part.items[1], True) for part in excluded if len(part.items) == 2 and is_name(part.items[0])]
            if kept is None or len(points) < len(excluded) or any(end is None or end.infinite for end in points):
                return None
            return self._without_points(kept, [Interval(end, end) for end in points if end is not None])
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
        return [Interval(low, high)] if first is not None and last is not None and first < last else union

    @staticmethod
    def _joined(parts: list[list[Interval] | None]) -> list[Interval] | None:
        joined: list[Interval] = []
        for part in parts:
            if part is None:
                return None
            joined.extend(part)
        return joined

    @staticmethod
    def _interval(node: Bracketed) -> list[Interval] | None:
        if len(node.parts) != 2 or node.opening not in ("(", "[") or node.closing not in (")", "]"):
            return None
        low, high = _end(node.parts[0], node.opening == "["), _end(node.parts[1], node.closing == "]")
        return None if low is None or high is None else [Interval(low, high)]

    def _relation(self, node: Relation) -> list[Interval] | None:
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
                return [Interval(_everything().low, end), Interval(end, _everything().high)]
            if operator in ("<", "<="):
                return [Interval(_everything().low, end)]
            return [Interval(end, _everything().high)] if operator in (">", ">=") else None
        if len(node.items) == 3 and is_name(node.items[1]):
            low, high, operators = node.items[0], node.items[2], node.operators
            if set(operators) <= {">", ">="}:
                low, high, operators = high, low, operators[::-1]
                operators = tuple({">": "<", ">=": "<="}[operator] for operator in operators)
            if set(operators) <= {"<", "<="}:
                first, last = _end(low, operators[0] == "<="), _end(high, operators[1] == "<=")
                return None if first is None or last is None else [Interval(first, last)]
        return None

    def _within(self, around: str, radius: Node, operator: str) -> list[Interval] | None:
        """Returns (1,5) for `|x-3|<2`, and the two rays outside of it for `|x-3|>2`."""
        far = self._order(end) if (end := _end(radius, operator in ("<=", ">="))) is not None else None
        if end is None or far is None or not 0 < far < float("inf"):
            return None
        low, high = (
            End(f"{around}{sign}({end.latex})" if around else f"{sign}({end.latex})", end.closed) for sign in "-+"
        )
        if operator in ("<", "<="):
            return [Interval(low, high)]
        everything = _everything()
        return [Interval(everything.low, low), Interval(high, everything.high)] if operator in (">", ">=") else None

    def _order(self, end: End) -> Any:
        if end.infinite:
            return float("inf") * end.infinite
        return self.leaves.real_value(end.latex)

    def _merged(self, pieces: list[Interval]) -> list[Interval]:
        """Sorts the intervals and joins those that touch; returns them as given if an end has no numeric value."""
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
                    merged[-1] = (last_low, high, Interval(last.low, piece.high))
            else:
                merged.append((low, high, piece))
        return [piece for _, _, piece in merged]

    def _without_points(self, pieces: list[Interval], removed: list[Interval]) -> list[Interval] | None:
        """Returns the intervals without single points; None if an order is not known."""
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
                    rest += [Interval(piece.low, cut), Interval(cut, piece.high)]
                elif place in (low, high) and low < high:
                    rest.append(Interval(cut if place == low else piece.low, cut if place == high else piece.high))
                elif not low == place == high:
                    rest.append(piece)
            pieces = rest
        return pieces


def _everything() -> Interval:
    return Interval(End("-\\infty", False), End("\\infty", False))
