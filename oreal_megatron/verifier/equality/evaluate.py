"""Numeric value of a sympy tree with mpmath: no simplification, bounded work, high precision.

The evalf of sympy is not used: it tries symbolic identities, which a hostile expression can make arbitrarily slow.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import mpmath
import sympy
from mpmath import mp
from sympy.core.function import AppliedUndef

MAX_FACTORIAL = 100_000
MAX_SUM_TERMS = 12


class CannotEvaluate(ValueError):
    """Raised for a tree that has no numeric value here, or whose value would be too expensive."""


class Undefined(CannotEvaluate):
    """Raised for a division by zero or a logarithm of zero."""


Value = Any  # mpf or mpc; mpmath has no types
Point = Mapping[str, Value]


def _is_odd_root(exponent: sympy.Basic) -> bool:
    """Whether an exponent is a fraction with an odd denominator, so that negative bases have a real power."""
    if exponent.is_Rational:
        return bool(exponent.q % 2 == 1 and exponent.q > 1)
    if exponent.is_Pow:
        return exponent.args[1] == -1 and exponent.args[0].is_Integer and exponent.args[0] % 2 == 1
    return (
        exponent.is_Mul
        and any(map(_is_odd_root, exponent.args))
        and all(part.is_Integer or _is_odd_root(part) for part in exponent.args)
    )


def _power(base: Value, exponent: Value, odd_root: bool) -> Value:
    if odd_root and isinstance(base, mpmath.mpf) and base < 0:
        # Schools read these powers over the reals; the parity of the numerator gives the sign.
        return _real_root_sign(exponent) * mpmath.power(-base, exponent)
    if base == 0 and mpmath.re(exponent) < 0:
        raise Undefined("division by zero")
    if abs(exponent) > 1e7 and abs(base) not in (0, 1):
        raise CannotEvaluate("exponent too large")
    return mpmath.power(base, exponent)


def _real_root_sign(exponent: Value) -> int:
    """Returns -1 if the reduced numerator of p/q is odd, else 1. q is odd and found by trying small values."""
    for denominator in range(1, 200, 2):
        numerator = exponent * denominator
        if abs(numerator - mpmath.nint(numerator)) < mpmath.mpf(10) ** (-(mp.dps // 2)):
            return -1 if int(mpmath.nint(numerator)) % 2 else 1
    raise CannotEvaluate("a root of high degree")


def _integer(value: Value) -> int:
    rounded = int(mpmath.nint(mpmath.re(value)))
    if abs(value - rounded) > mpmath.mpf(10) ** (-(mp.dps // 2)):
        raise CannotEvaluate("not an integer")
    return rounded


def _floor(value: Value) -> Value:
    """Returns the floor; a value that rounding left just below an integer counts as that integer."""
    nearest = mpmath.nint(mpmath.re(value))
    return nearest if abs(value - nearest) < mpmath.mpf(10) ** (-(mp.dps // 2)) else mpmath.floor(mpmath.re(value))


def _factorial(value: Value) -> Value:
    if abs(value) > MAX_FACTORIAL:
        raise CannotEvaluate("factorial too large")
    return mpmath.factorial(value)


def _binomial(top: Value, bottom: Value) -> Value:
    if max(abs(top), abs(bottom)) > MAX_FACTORIAL:
        raise CannotEvaluate("binomial too large")
    return mpmath.binomial(top, bottom)


def _log(value: Value, base: Value | None = None) -> Value:
    if value == 0 or base == 0 or base == 1:
        raise Undefined("logarithm of zero")
    return mpmath.log(value) if base is None else mpmath.log(value) / mpmath.log(base)


_FUNCTIONS: dict[str, Callable[..., Value]] = {
    "exp": mpmath.exp, "log": _log, "sin": mpmath.sin, "cos": mpmath.cos, "tan": mpmath.tan, "cot": mpmath.cot,
    "sec": mpmath.sec, "csc": mpmath.csc, "asin": mpmath.asin, "acos": mpmath.acos, "atan": mpmath.atan,
    "acot": mpmath.acot, "asec": mpmath.asec, "acsc": mpmath.acsc, "sinh": mpmath.sinh, "cosh": mpmath.cosh,
    "tanh": mpmath.tanh, "asinh": mpmath.asinh, "acosh": mpmath.acosh, "atanh": mpmath.atanh, "Abs": abs,
    "floor": _floor, "ceiling": lambda value: -_floor(-value), "factorial": _factorial, "binomial": _binomial,
    "re": mpmath.re, "im": mpmath.im, "conjugate": mpmath.conj, "sign": mpmath.sign, "UnevaluatedExpr": lambda v: v,
    "Max": lambda *values: max(map(mpmath.re, values)), "Min": lambda *values: min(map(mpmath.re, values)),
    "Mod": lambda a, b: a - b * _floor(a / b),
}  # fmt: skip


def _sum_or_product(tree: sympy.Basic, point: Point) -> Value:
    """Evaluates all terms of a finite sum or product, and the first terms of an infinite one."""
    body, limits = tree.args[0], tree.args[1:]
    if len(limits) != 1 or len(limits[0]) != 3:
        raise CannotEvaluate("nested limits")
    name, low, high = limits[0]
    first = _integer(evaluate(low, point))
    endless = high in (sympy.oo, sympy.zoo)
    last = first + MAX_SUM_TERMS if endless else _integer(evaluate(high, point))
    if last - first > 2_000:
        raise CannotEvaluate("too many terms")
    is_sum = type(tree).__name__ == "Sum"
    total = mpmath.mpf(0 if is_sum else 1)
    for index in range(first, last + 1):
        term = evaluate(body, {**point, str(name): mpmath.mpf(index)})
        total = total + term if is_sum else total * term
    return total


def _symbol(name: str, point: Point) -> Value:
    if name in point:
        return point[name]
    if name == "i":
        return mpmath.mpc(0, 1)
    raise CannotEvaluate(f"no value for {name}")


def _unknown_function(name: str, arguments: list[Value]) -> Value:
    """Evaluates f(x) of an undefined f: an irregular function that is the same on both sides."""
    seed = mpmath.mpf(zlib.crc32(name.encode()) % 10_007) / 10_007 + mpmath.sqrt(2)
    return mpmath.fsum(
        seed ** (index + 2) + seed * argument + argument * argument / 3 for index, argument in enumerate(arguments)
    )


def evaluate(tree: sympy.Basic, point: Point) -> Value:
    """Returns the value of `tree` at `point`, which gives every free symbol its value. Raises CannotEvaluate."""
    if isinstance(tree, sympy.Integer):
        return mpmath.mpf(int(tree))
    if isinstance(tree, sympy.Rational):
        return mpmath.mpf(int(tree.p)) / mpmath.mpf(int(tree.q))
    if isinstance(tree, sympy.Symbol):
        return _symbol(tree.name, point)
    if tree is sympy.pi:
        return +mp.pi
    if tree is sympy.E:
        return +mp.e
    if tree is sympy.oo or tree is -sympy.oo:
        return mpmath.inf if tree is sympy.oo else -mpmath.inf
    if tree is sympy.I:
        return mpmath.mpc(0, 1)
    name = type(tree).__name__
    if name in ("Sum", "Product"):
        return _sum_or_product(tree, point)
    if name == "Add":
        return mpmath.fsum(evaluate(part, point) for part in tree.args)
    if name == "Mul":
        return mpmath.fprod(evaluate(part, point) for part in tree.args)
    if name == "Pow":
        return _power(evaluate(tree.args[0], point), evaluate(tree.args[1], point), _is_odd_root(tree.args[1]))
    function = _FUNCTIONS.get(name)
    if isinstance(tree, AppliedUndef):
        return _unknown_function(name, [evaluate(part, point) for part in tree.args])
    if function is None:
        raise CannotEvaluate(f"no numeric value for {name}")
    try:
        return function(*(evaluate(part, point) for part in tree.args))
    except (ValueError, ZeroDivisionError, OverflowError) as error:
        raise CannotEvaluate(str(error)) from None
