"""The full parser: LaTeX of a single expression -> unevaluated sympy tree, by means of latex2sympy2_extended.

Most answers never reach it, since `latex_parser` reads the common part of the language. Two measures make it fast:
symbols are spelled so that they need no look-ahead, and the parser first predicts in SLL mode, which is about seven
times cheaper than the default mode. If SLL mode does not suffice, it fails; it never misreads.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache

import sympy
from antlr4.atn.PredictionMode import PredictionMode
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, _Latex2Sympy

from oreal_megatron.verifier.input_limits import Refused, check_expression
from oreal_megatron.verifier.latex.latex_parser import GREEK, Unreadable, read_common
from oreal_megatron.verifier.latex.rational import parse_rational

MAX_TREE_NODES = 3_000
MAX_FULL_PARSER_CHARS = 2_000

_CONFIG = ConversionConfig(interpret_as_mixed_fractions=True, lowercase_symbols=False)
_NOT_EXPRESSIONS = (sympy.Set, sympy.Tuple, sympy.core.relational.Relational, sympy.logic.boolalg.BooleanFunction)

_DECIMAL = re.compile(r"(?<![\d.])(\d*\.\d+|\d+\.(?!\.))")
_REPEATING = re.compile(r"\d*\.\d*\\overline\s*\{\s*\d+\s*\}")
_UNBRACED_POWER = re.compile(r"\^\s*(\d)(?=\d)")
_SIGNED_POWER = re.compile(r"\^\s*([+-]\s*(?:\d+|[A-Za-z]))")
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
_DEGREES = re.compile(r"(\d+|\))\s*\\degree(?![A-Za-z])")
_PRIMES = re.compile(r"([A-Za-z])\s*('{1,3})")
_WORDS = re.compile(r"\\text\s*\{\s*([^{}]*?)\s*\}")
_GREEK_LETTER = rf"\\(?:{'|'.join(sorted(GREEK))})(?![A-Za-z])"
_SYMBOL = re.compile(rf"(?P<greek>{_GREEK_LETTER})|\\[A-Za-z]+|(?P<letter>[A-Za-z])")
_SUBSCRIPT = re.compile(r"\s*_\s*(?:\{([^{}]{0,40}(?:\{[^{}]{0,20}\}[^{}]{0,20})?)\}|(\\[A-Za-z]+|\w))")
_POWER_NEXT = re.compile(r"\s*\^")


class _FastParser(_Latex2Sympy):
    """The parser in the cheaper prediction mode, SLL."""

    def create_parser(self, latex_str: str):  # type: ignore[no-untyped-def]
        parser = super().create_parser(latex_str)
        parser._interp.predictionMode = PredictionMode.SLL
        return parser


def _decimal_to_fraction(text: str) -> str:
    value = parse_rational(text)
    return text if value is None else f"(\\frac{{{value.numerator}}}{{{value.denominator}}})"


def _variable(name: str, powered: bool) -> str:
    """Spells a symbol with a name of letters and digits, in braces if a power follows."""
    symbol = f"\\variable{{{name}}}"
    return f"{{{symbol}}}" if powered else f" {symbol} "


def _spell_symbols(latex: str) -> str:
    r"""Rewrites `x_{1}^2 y` to `{\variable{xsub1}}^2 y` and `n^2` to `{n}^2`, which need no look-ahead."""
    pieces: list[str] = []
    position = 0
    for match in _SYMBOL.finditer(latex):
        if match.start() < position:
            continue
        symbol = match["greek"] or match["letter"]
        if symbol is None:
            continue
        subscript = _SUBSCRIPT.match(latex, match.end())
        powered = _POWER_NEXT.match(latex, subscript.end() if subscript else match.end()) is not None
        if subscript is None and match["letter"] and not powered:
            continue
        pieces.append(latex[position : match.start()])
        position = match.end()
        if subscript is not None:
            index = "".join(
                re.findall(r"[A-Za-z0-9]", (subscript[1] if subscript[1] is not None else subscript[2]) or "")
            )
            if not index:
                raise Unreadable("an empty subscript")
            pieces.append(_variable(f"{symbol.lstrip(chr(92))}sub{index}", powered))
            position = subscript.end()
        elif match["greek"]:
            pieces.append(_variable(symbol[1:], powered))
        else:
            pieces.append(f"{{{symbol}}}")
    return "".join(pieces) + latex[position:]


_STEPS: tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = (
    (_REPEATING, lambda m: _decimal_to_fraction(m[0])),
    (_THOUSANDS, lambda m: m[0].replace(",", "")),
    (_DECIMAL, lambda m: _decimal_to_fraction(m[0])),
    (_SIGNED_POWER, r"^{\1}"),
    (re.compile(r"\\log\s*_\s*(\d)(?=\d)"), r"\\log_{\1} "),
    (_UNBRACED_POWER, r"^{\1} \\cdot "),  # LaTeX typesets 2^10 as 2^1 times 0
    (_DEGREES, r"(\1 \\cdot \\frac{\\pi}{180})"),
    (re.compile(r"\\lg(?![A-Za-z])"), r"\\log_{10}"),
    (_PRIMES, lambda m: f"{m[1]}_{{{'prime' * len(m[2])}}}"),
)


def prepare(latex: str) -> str:
    """Rewrites notation that the grammar lacks or reads inexactly: decimals, degrees, names of several letters."""
    if "@" in latex:
        raise Unreadable("the sign @")  # it marks words below
    if re.search(r"\d\s*_", latex):
        raise Unreadable("a number with an index that is no base of its digits")
    for pattern, replacement in _STEPS:
        latex = pattern.sub(replacement, latex)
    words: list[str] = []

    def keep(match: re.Match[str]) -> str:
        letters = re.sub(r"[^A-Za-z0-9]", "", match[1])
        if not letters:
            if re.search(r"[^\s.,;:()'\"-]", match[1]):
                raise Unreadable("words of another script, or an operator in roman type")
            return " "
        words.append(letters)
        return f" @{len(words) - 1}@ "

    latex = _spell_symbols(_WORDS.sub(keep, latex))
    latex = re.sub(r"@(\d+)@", lambda m: _variable("text" + words[int(m[1])], True), latex)
    latex = latex.replace("*", r"\cdot ").replace("!", " ! ").strip()
    return latex[1:-1] if re.fullmatch(r"\{\\variable\{\w+\}\}", latex) else latex


def parse_full(latex: str) -> sympy.Basic:
    """Returns the tree of a prepared text. Raises Unreadable."""
    for parser in (_FastParser, _Latex2Sympy):
        try:
            return parser(config=_CONFIG).parse(latex)
        except (MemoryError, RecursionError):
            raise
        except Exception as error:  # the parser raises bare Exception for every syntax error
            failure = error
    message = str(failure).splitlines()
    raise Unreadable(message[0][:100] if message else type(failure).__name__) from None


@lru_cache(maxsize=4_096)
def read(latex: str) -> sympy.Basic:
    """Returns the tree of an expression. Raises Refused or Unreadable."""
    check_expression(latex)
    value = parse_rational(latex)
    if value is not None:
        return sympy.Rational(value.numerator, value.denominator)
    try:
        return read_common(latex)
    except Unreadable:
        if len(latex) > MAX_FULL_PARSER_CHARS:
            raise Refused(f"an expression of more than {MAX_FULL_PARSER_CHARS} characters") from None
        tree = parse_full(prepare(latex))
    if not isinstance(tree, sympy.Basic) or isinstance(tree, _NOT_EXPRESSIONS):
        raise Unreadable("not a single expression")
    if sum(1 for _ in sympy.preorder_traversal(tree)) > MAX_TREE_NODES:
        raise Refused(f"an expression of more than {MAX_TREE_NODES} parts")
    if tree.has(sympy.nan, sympy.zoo):
        raise Unreadable("an indeterminate form")
    return tree
