"""A recursive-descent parser of common LaTeX expressions: numbers, symbols, arithmetic, roots, functions.

It is about fifty times faster than the full parser and covers nearly all final answers. Text that is outside of its
grammar, or that could be read in two ways, raises `Unreadable` and goes to the full parser. Trees are built
unevaluated: no power or factorial is computed here.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import sympy
from sympy import Add, Mul, Pow, Rational

from oreal_megatron.verifier.latex.rational import parse_rational

GREEK = frozenset([
    "alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu", "nu",
    "xi", "rho", "sigma", "tau", "upsilon", "phi", "chi", "psi", "omega", "Delta", "Theta", "Lambda", "Xi", "Sigma",
    "Phi", "Psi", "Omega", "hbar", "ell", "prime", "nabla",
])  # fmt: skip


def _cis(angle: sympy.Basic, evaluate: bool = True) -> sympy.Basic:
    return sympy.exp(product([sympy.I, angle]), evaluate=evaluate)  # type: ignore[call-arg]


_FUNCTIONS: dict[str, Callable[[sympy.Basic], sympy.Basic]] = {
    "sin": sympy.sin, "cos": sympy.cos, "tan": sympy.tan, "cot": sympy.cot, "sec": sympy.sec, "csc": sympy.csc,
    "arcsin": sympy.asin, "arccos": sympy.acos, "arctan": sympy.atan, "sinh": sympy.sinh, "cosh": sympy.cosh,
    "tanh": sympy.tanh, "ln": sympy.log, "log": sympy.log, "lg": sympy.log, "exp": sympy.exp,
    "cis": _cis,
}  # fmt: skip
_INVERSES = {"sin": sympy.asin, "cos": sympy.acos, "tan": sympy.atan}
_TOKEN = re.compile(
    r"\\[A-Za-z]+|\d{1,3}(?:,\d{3})+(?:\.\d+)?(?![\d,])|\d+\.?\d*|\.\d+|[A-Za-z]|[-+*/^_!()\[\]{}|]|\s+"
)
_END = ""
_TERM_ENDS = frozenset({"+", "-", ")", "]", "}", "|", "\\rfloor", "\\rceil", _END})
MAX_TOKENS = 12_000


class Unreadable(ValueError):
    """Raised for a text that a parser does not accept."""


def _tokens(latex: str) -> list[str]:
    tokens, position = [], 0
    for match in _TOKEN.finditer(latex):
        if match.start() != position:
            raise Unreadable(latex[position : match.start()])
        position = match.end()
        if not match[0].isspace():
            tokens.append(match[0])
    if position != len(latex) or len(tokens) > MAX_TOKENS:
        raise Unreadable(latex[position:])
    return tokens


def _apply(function: Callable[..., sympy.Basic], *arguments: sympy.Basic) -> sympy.Basic:
    return function(*arguments, evaluate=False)  # type: ignore[call-arg]


def product(factors: list[sympy.Basic]) -> sympy.Basic:
    """Returns the unevaluated product of the factors; a single factor as it is."""
    return factors[0] if len(factors) == 1 else Mul(*factors, evaluate=False)


def _inverse(tree: sympy.Basic) -> sympy.Basic:
    return Pow(tree, -1, evaluate=False)


class _Parser:
    """A pass over the tokens; each method parses the construct of its name and leaves `position` behind it."""

    def __init__(self, latex: str) -> None:
        self.tokens = _tokens(latex)
        self.position = 0

    @property
    def next(self) -> str:
        return self.tokens[self.position] if self.position < len(self.tokens) else _END

    def take(self, expected: str | None = None) -> str:
        token = self.next
        if token == _END or (expected is not None and token != expected):
            raise Unreadable(f"{token!r} where {expected!r} was expected")
        self.position += 1
        return token

    def read_all(self) -> sympy.Basic:
        tree = self.sum()
        if self.next != _END:
            raise Unreadable(self.next)
        return tree

    def sum(self) -> sympy.Basic:
        terms = [self.signed_term()]
        while self.next in ("+", "-"):
            terms.append(self.signed_term())
        return terms[0] if len(terms) == 1 else Add(*terms, evaluate=False)

    def signed_term(self) -> sympy.Basic:
        if self.next not in ("+", "-"):
            return self.term()
        negative = self.take() == "-"
        if self.next in ("+", "-"):
            raise Unreadable("two signs")
        return product([sympy.Integer(-1), self.term()]) if negative else self.term()

    def term(self) -> sympy.Basic:
        """Parses adjacent or operator-joined factors, from left to right."""
        factors = [self.mixed_or_factor()]
        while self.next not in _TERM_ENDS:
            operator = self.take() if self.next in ("*", "/", "\\cdot", "\\times", "\\div") else None
            if operator is None and self.next[0] in "{0123456789.":
                raise Unreadable("a number after a factor")
            if operator is not None and self.next == "-":
                raise Unreadable("a signed factor")
            factor = self.factor()
            factors.append(_inverse(factor) if operator in ("/", "\\div") else factor)
        return product(factors)

    def mixed_or_factor(self) -> sympy.Basic:
        r"""Parses `2\frac{1}{3}` as seven thirds, and `2\frac{a}{3}` as a product."""
        if self.next.isdigit() and self.tokens[self.position + 1 : self.position + 2] == ["\\frac"]:
            parts = self.tokens[self.position + 2 : self.position + 8]
            if (
                len(parts) == 6
                and parts[::3] == ["{", "{"]
                and parts[2::3] == ["}", "}"]
                and parts[1].isdigit()
                and parts[4].isdigit()
            ):
                whole, top, bottom = int(self.take()), int(parts[1]), int(parts[4])
                if not 0 < top < bottom:
                    raise Unreadable("a product or a mixed number")
                self.position += 7
                return self.power_of(Rational(whole * bottom + top, bottom))
        return self.factor()

    def factor(self) -> sympy.Basic:
        if self.next.startswith("\\") and self.next[1:] in _FUNCTIONS:
            return self.function()
        return self.power_of(self.atom())

    def power_of(self, base: sympy.Basic) -> sympy.Basic:
        while self.next in ("!", "\\degree"):
            if self.take() == "\\degree":
                base = product([base, Rational(1, 180), sympy.pi])
            elif self.next == "!":
                raise Unreadable("a double factorial")
            else:
                base = _apply(sympy.factorial, base)
        if self.next != "^":
            return base
        self.take()
        power = Pow(base, self.exponent(), evaluate=False)
        if self.next in ("^", "!", "_"):
            raise Unreadable("a power of a power")
        return power

    def exponent(self) -> sympy.Basic:
        if self.next == "{":
            return self.group("{", "}")
        token = self.take()
        if token.isdigit():
            if len(token) > 1:  # LaTeX typesets only the first digit as the exponent
                raise Unreadable("an exponent without braces")
            return sympy.Integer(token)
        if len(token) == 1 and token.isalpha():
            return self.symbol(token)
        raise Unreadable(token)

    def group(self, opening: str, closing: str) -> sympy.Basic:
        self.take(opening)
        tree = self.sum()
        self.take(closing)
        return tree

    def atom(self) -> sympy.Basic:
        token = self.next
        if token in _BRACKETS:
            return self.brackets(token)
        self.take()
        if token[:1] in "0123456789." and token:
            value = parse_rational(token)
            if value is None:
                raise Unreadable(token)
            return Rational(value.numerator, value.denominator)
        if len(token) == 1 and token.isalpha():
            return self.symbol(token)
        if token == "\\pi":
            return sympy.pi
        if token == "\\neg" and self.next.isalpha():
            return sympy.Symbol(f"not{self.take()}")
        if token == "\\frac":
            top, bottom = self.group("{", "}"), self.group("{", "}")
            return product([top, _inverse(bottom)])
        if token == "\\sqrt":
            return self.root()
        if token == "\\binom":
            return _apply(sympy.binomial, self.group("{", "}"), self.group("{", "}"))
        if token[1:] in GREEK and token[0] == "\\":
            return self.symbol(token[1:])
        raise Unreadable(token)

    def brackets(self, opening: str) -> sympy.Basic:
        inside = self.group(opening, _BRACKETS[opening])
        if opening == "|":
            return _apply(sympy.Abs, inside)
        if opening == "\\lfloor":
            return _apply(sympy.floor, inside)
        return _apply(sympy.ceiling, inside) if opening == "\\lceil" else inside

    def root(self) -> sympy.Basic:
        degree = self.group("[", "]") if self.next == "[" else sympy.Integer(2)
        return Pow(self.group("{", "}"), _inverse(degree) if degree != 2 else Rational(1, 2), evaluate=False)

    def symbol(self, name: str) -> sympy.Basic:
        if self.next == "_":
            self.take()
            name = f"{name}sub{self.index()}"
        elif name == "e":
            return sympy.E
        if self.next == "(" and len(name) == 1 and self.is_call():
            raise Unreadable("a function of a symbol")
        return sympy.Symbol(name)

    def is_call(self) -> bool:
        """Whether `(x)` follows, so that the symbol in front of it is the name of a function."""
        after = self.tokens[self.position + 1 : self.position + 3]
        return len(after) == 2 and after[1] == ")"

    def index(self) -> str:
        if self.next != "{":
            return self.take().lstrip("\\")
        self.take()
        letters = ""
        while self.next != "}":
            letters += re.sub(r"[^A-Za-z0-9]", "", self.take())
        self.take()
        if not letters:
            raise Unreadable("an empty subscript")
        return letters

    def function(self) -> sympy.Basic:
        name = self.take()[1:]
        function, base, power = _FUNCTIONS[name], None, None
        if name == "lg" or (name == "log" and self.next != "_"):
            base = sympy.Integer(10)
        elif name == "log":
            self.take()
            base = self.group("{", "}") if self.next == "{" else self.atom()
        if self.next == "^":
            self.take()
            power = self.exponent()
            if power == -1 or (power.is_Mul and power.args[0] == -1):
                if name not in _INVERSES or power != product([sympy.Integer(-1), sympy.Integer(1)]):
                    raise Unreadable("a negative power of a function")
                function, power = _INVERSES[name], None
        argument = self.argument()
        value = _apply(function, argument) if base is None else _apply(sympy.log, argument, base)
        return value if power is None else Pow(value, power, evaluate=False)

    def argument(self) -> sympy.Basic:
        r"""Parses `(2x)` of `\sin(2x)` and `2x` of `\sin 2x`; the next function ends the argument."""
        if self.next in ("(", "{", "["):
            tree = self.brackets(self.next)
            if self.next in ("^", "!", "/", "\\degree"):
                raise Unreadable("an operator behind a function's argument")
            return tree
        factors = [self.factor()]
        while self.next not in _TERM_ENDS and not (self.next.startswith("\\") and self.next[1:] in _FUNCTIONS):
            if self.next in ("*", "/", "\\cdot", "\\times", "\\div", "(", "[", "|"):
                raise Unreadable("an argument without brackets that may end here")
            factors.append(self.factor())
        return product(factors)


_BRACKETS = {"(": ")", "[": "]", "{": "}", "|": "|", "\\lfloor": "\\rfloor", "\\lceil": "\\rceil"}


def read_common(latex: str) -> sympy.Basic:
    """Returns the tree of an expression of the common grammar. Raises Unreadable."""
    try:
        return _Parser(latex).read_all()
    except (TypeError, ValueError) as error:
        raise Unreadable(str(error)) from None
