"""Normalization of LaTeX and unicode to a single spelling: text to text, in linear time, without interpretation."""

from __future__ import annotations

import functools
import re
import unicodedata

from oreal_megatron.verifier.latex.notation import unit_vectors, usual_notation, without_phrases
from oreal_megatron.verifier.latex.unit_vocabulary import UNIT_LETTERS

_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n", strict=True))
_SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉", "0123456789", strict=True))
_SUPERSCRIPT_RUN = re.compile(f"[{''.join(_SUPERSCRIPTS)}]+")
_SUBSCRIPT_RUN = re.compile(f"[{''.join(_SUBSCRIPTS)}]+")

_UNICODE = {
    "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-",
    "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ", "÷": r"\div ", "∕": "/", "⁄": "/",
    "≤": r"\le ", "⩽": r"\le ", "≦": r"\le ", "≥": r"\ge ", "⩾": r"\ge ", "≧": r"\ge ", "≠": r"\ne ",
    "≈": r"\approx ", "≅": r"\approx ", "≡": r"\equiv ", "±": r"\pm ", "∓": r"\mp ",
    "∞": r"\infty ", "π": r"\pi ", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ",
    "λ": r"\lambda ", "μ": r"\mu ", "σ": r"\sigma ", "φ": r"\phi ", "ω": r"\omega ", "δ": r"\delta ",
    "Δ": r"\Delta ", "ε": r"\epsilon ", "ρ": r"\rho ", "τ": r"\tau ",
    "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "∖": r"\setminus ", "ℝ": r"\mathbb{R}",
    "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}", "ℂ": r"\mathbb{C}",
    "∧": r"\land ", "∨": r"\lor ", "¬": r"\neg ", "→": r"\to ", "∀": r"\forall ", "∃": r"\exists ",
    "√": r"\sqrt ", "∛": r"\sqrt[3] ", "∜": r"\sqrt[4] ", "°": r"\degree ",
    "º": r"\degree ", "′": "'", "’": "'", "‘": "'", "“": '"', "”": '"',
    "∠": r"\angle ",
    "⟨": r"\langle ", "⟩": r"\rangle ", "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ",
    "¢": r"\text{ cents}", "€": r"\euro ", "£": r"\pounds ", "¥": r"\yen ", "₹": r"\rupees ", "、": ",",
    "。": ".", "…": r"\ldots ",
    "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}",
}  # fmt: skip

_COMMANDS = {
    "dfrac": "frac", "tfrac": "frac", "cfrac": "frac", "leq": "le", "leqslant": "le", "leqq": "le", "lt": "lt",
    "geq": "ge", "geqslant": "ge", "geqq": "ge", "neq": "ne", "varnothing": "emptyset", "mbox": "text",
    "textbf": "text", "textit": "text", "textrm": "text", "textnormal": "text", "textsf": "text", "emph": "text",
    "texttt": "text", "textsc": "text", "textup": "text", "textmd": "text", "textsl": "text",
    "hbox": "text", "dbinom": "binom", "tbinom": "binom", "simeq": "approx", "cong": "approx", "doteq": "approx",
    "lbrace": "{", "rbrace": "}", "lbrack": "[", "rbrack": "]", "lvert": "|", "rvert": "|", "vert": "|", "mid": "|",
    "arcsin": "arcsin", "wedge": "land", "vee": "lor", "lnot": "neg", "rightarrow": "to", "dots": "ldots",
    "cdots": "ldots", "backslash": "setminus", "smallsetminus": "setminus", "textdollar": "$", "mathdollar": "dollar",
    "fbox": "boxed",
    "varphi": "phi", "varepsilon": "epsilon", "bigcup": "bigcup", "textdegree": "degree", "degrees": "degree",
    "lang": "langle", "rang": "rangle", "bmod": "mod", "iff": "Leftrightarrow", "implies": "Rightarrow",
}  # fmt: skip

# Layout without meaning; `\limits` and `\nolimits` only move indices.
_DROPPED_COMMANDS = frozenset([
    "left", "right", "big", "Big", "bigg", "Bigg", "bigl", "bigr", "Bigl", "Bigr", "biggl", "biggr", "middle",
    "displaystyle", "textstyle", "scriptstyle", "scriptscriptstyle", "limits", "nolimits", "noindent", "boldmath",
    "bf", "rm", "it", "sf", "tt", "normalfont", "large", "Large", "small", "bold", "centering", "hfill",
    "allowbreak", "nonumber", "notag", "strut", "mathstrut", "tiny", "scriptsize", "footnotesize", "normalsize",
    "huge", "Huge", "LARGE", "blacksquare", "square", "qed", "checkmark", "therefore",
])  # fmt: skip
_SPACE_COMMANDS = frozenset(
    ["quad", "qquad", "enspace", "thinspace", "space", "medspace", "thickspace", "newline", "hskip"]
)
# Commands that set the typeface of their argument, which is kept.
_UNWRAPPED_COMMANDS = frozenset([
    "mathbf", "mathit", "mathsf", "mathtt", "boldsymbol", "bm", "pmb", "mathnormal", "displaymath", "underline",
    "cancel", "mathop", "phantomsection", "ensuremath", "boxed",
])  # fmt: skip
_COMMAND = re.compile(r"\\([A-Za-z]+)\*?")
_SPACING_SYMBOL = re.compile(r"\\[,;: ]|\\\n|~|\\$")
_COLOR = re.compile(r"\\(?:text)?color(?:box)?\s*\{#?[A-Za-z0-9!]{0,30}\}")
_MEASURED_SPACE = re.compile(r"\\(?:[hvm]space|tag|label|rule)\*?\s*\{[^{}]{0,30}\}(?:\s*\{[^{}]{0,30}\})?")
_HTML_SCRIPT = re.compile(r"<(su[bp])>([^<>]{0,50})</\1>")
_ROW_END = re.compile(
    r"\\\\(?:\*)?(?:\s*\[\s*-?[\d.]{0,8}\s*(?:pt|em|ex|mm|cm|in|px|mu|bp|pc|\\[A-Za-z]{1,20})\s*\])?|\\(?:cr|tabularnewline)(?![A-Za-z])"
)
_COLON = re.compile(r"\{\s*:\s*\}|\\math(?:bin|rel|punct|ord)\s*\{\s*:\s*\}|\\colon(?![A-Za-z])")
_THOUSANDS_BRACES = re.compile(r"(?<=\d)\{,\}(?=\d{3})|(?<=\d),\\!\s*(?=\d{3})|(?<=\d)\\,(?=\d{3}(?!\d))")
_FRACTION = re.compile(r"\\(frac|binom)\s*(?![\s{])(\d|[A-Za-z](?![A-Za-z])|\\[A-Za-z]+)\s*")
_BARE_ROOT = re.compile(r"\\sqrt\s*(\[[^\[\]]{1,20}\])?\s*(\d|[A-Za-z])")
_DEGREE = re.compile(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)(?![A-Za-z])|\^\s*\{\s*\\degree\s*\}|\^\s*\\degree(?![A-Za-z])")
_PLAIN_FUNCTION = re.compile(
    r"(?<![A-Za-z\\])(sqrt|arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|ln|log|exp)(?=\s*[\d(^{_]|\s+[a-z](?![a-z]))"
)
_PLAIN_NAME = re.compile(r"(?<![A-Za-z\\])(pi|theta|infinity|infty)(?![A-Za-z])")
_PHANTOM = re.compile(r"\\[hv]?phantom\s*(?:\{[^{}]*\}|[-+\w])")
_FUNCTION_IN_TEXT = re.compile(r"\\text\s*\{\s*(lcm|gcd|max|min|cis)\s*\}(?=\s*[\\({])")
_NUMERAL_IN_TEXT = re.compile(r"\\text\s*\{\s*([0-9A-Z]+)\s*\}(?=\s*_)|(?<=\d)\\text\s*\{([\d.]+)\}")
_IDLE_SPACE = re.compile(r"(?<!\d) +| +(?!\d)")
_SPACED_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?: \d{3})+(?![\d ])")
_CHOOSE = re.compile(r"\{\s*([^{}]*?)\s*\\choose\s*([^{}]*?)\s*\}")
_SET_ARGUMENT = re.compile(r"\\(max|min|gcd|lcm)\s*\\\{([^{}\\]*)\\\}")
_PREAMBLE = re.compile(r"\\text\s*\{\s*(?:the\s+)?(?:final\s+)?answer(?:\s+is)?\s*:?\s*\}\s*:?", re.IGNORECASE)
_MARKDOWN = re.compile(r"(\*\*|`|\$\$?)(.+)\1", re.DOTALL)
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_SPACES = re.compile(r"\s+")
_ROOT_SIGN = re.compile(r"([√∛∜])\s*(\d+(?:\.\d+)?)")
_INVISIBLE = re.compile("[\u200b-\u200f\u2060-\u2064\ufeff\u00ad\u202a-\u202e]")


def _fold_unicode(text: str) -> str:
    """Rewrites mathematical signs as LaTeX, and compatibility forms (full width, bold letters) as plain characters."""
    text = _INVISIBLE.sub("", text)
    text = _SUPERSCRIPT_RUN.sub(lambda run: "^{" + "".join(_SUPERSCRIPTS[c] for c in run[0]) + "}", text)
    text = _SUBSCRIPT_RUN.sub(lambda run: "_{" + "".join(_SUBSCRIPTS[c] for c in run[0]) + "}", text)
    text = _ROOT_SIGN.sub(lambda root: f"{_UNICODE[root[1]].rstrip()}{{{root[2]}}}", text)
    text = "".join(_UNICODE.get(char, char) for char in text)
    return unicodedata.normalize("NFKC", text)


def _rename_command(match: re.Match[str]) -> str:
    name = match[1]
    if name in _DROPPED_COMMANDS:
        return " "
    if name in _SPACE_COMMANDS:
        return " "
    if name in _UNWRAPPED_COMMANDS:
        return "\\" + name
    renamed = _COMMANDS.get(name, name)
    if not renamed.isalpha():
        return renamed if renamed in "|[]" else "\\" + renamed
    return "\\" + renamed


def matching_brace(text: str, start: int) -> int:
    """Returns the index of the brace that closes the brace at `start`, or -1. Escaped braces don't count."""
    depth = 0
    for match in _BRACE.finditer(text, start):
        if match[0] == "{":
            depth += 1
        elif match[0] == "}":
            depth -= 1
            if depth == 0:
                return match.start()
    return -1


_UPRIGHT = re.compile(r"\\(?:mathrm|operatorname)\s*\{\s*([^{}]*?)\s*\}")
_UPRIGHT_UNIT = re.compile(
    r"(?<=[\d})])([\s~]*)\\(?:mathrm|operatorname)\s*\{[\s~]*([a-zA-Z]|min)\s*\}(?=\s*(?:$|[\\^/.]))"
)
_UPRIGHT_POWER = re.compile(r"(\\mathrm\s*\{[^{}]*)\^\s*\{?\s*(-?\d)\s*\}?\s*\}")
_SIUNITX = re.compile(
    r"\\(?:SI|qty)\s*\{([^{}]*)\}\s*\{\s*\\?([^{}\\]*)\}|\\num\s*\{([^{}]*)\}|\\unit\s*\{\s*\\?([^{}\\]*)\}"
)
_PLAIN_TEX_MATRIX = re.compile(r"\\([pbB]?matrix)\s*(?=\{)")
_UPRIGHT_LETTER = re.compile(r"\\(?:mathrm|operatorname)\s*([A-Za-z])(?![A-Za-z])")
_FUNCTIONS = frozenset([
    "sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "arccot", "sinh", "cosh", "tanh", "log",
    "ln", "lg", "exp", "gcd", "lcm", "max", "min", "mod", "det",
    "cis",
])  # fmt: skip
_UNIT_FRACTION = re.compile(r"\\frac\s*\{\s*\\text\s*\{([^{}]*)\}\s*\}\s*\{\s*\\text\s*\{([^{}]*)\}\s*\}")
_ORDINAL = re.compile(
    r"(\d)\s*(?:\^\s*\{\s*\\text\s*\{\s*(?:st|nd|rd|th)\s*\}\s*\}|\^?\s*\\text\s*\{\s*(?:st|nd|rd|th)\s*\}"
    r"|\^\s*\{\s*(?:st|nd|rd|th)\s*\}|(?:st|nd|rd|th)(?![A-Za-z]))"
)


def _upright(match: re.Match[str]) -> str:
    r"""Rewrites `\mathrm{e}` as e, `\mathrm{lcm}` as a function, `\mathrm{cm}` as a word."""
    name = match[1]
    if name in _FUNCTIONS:
        return f"\\{name} "
    return f"\\text{{{name}}}" if sum(map(str.isalpha, name)) > 1 and "\\" not in name else name


def _unwrap(text: str) -> str:
    r"""Rewrites `\mathbf{v}` to `v` and `\mathbf{ab}^2` to `{ab}^2`."""
    pieces, position = [], 0
    for match in _TYPEFACE.finditer(text):
        if match.start() < position:
            continue
        pieces.append(text[position : match.start()])
        position = match.end()
        close = matching_brace(text, position) if text.startswith("{", position) else -1
        if close >= 0 and not re.compile(r"\s*[_^]").match(text, close + 1):
            pieces.append(_unwrap(text[position + 1 : close]))
            position = close + 1
    return "".join(pieces) + text[position:]


_TYPEFACE = re.compile(rf"\\(?:{'|'.join(sorted(_UNWRAPPED_COMMANDS))})(?![A-Za-z])\s*")


def _brace_fractions(text: str) -> str:
    r"""Rewrites `\frac12` to `\frac{1}{2}`, `\frac1{72}` to `\frac{1}{72}`, `\frac{1}c` to `\frac{1}{c}`."""
    text = _FRACTION.sub(r"\\\1{\2}", text)
    pieces: list[str] = []
    position = 0
    for match in re.finditer(r"\\(?:frac|binom)\s*\{", text):
        if match.start() < position:
            continue
        close = matching_brace(text, match.end() - 1)
        if close < 0:
            break
        after = re.compile(r"\s*(\d|[A-Za-z])").match(text, close + 1)
        if after:
            pieces.append(text[position : close + 1] + "{" + after[1] + "}")
            position = after.end()
    return "".join(pieces) + text[position:]


def _siunitx(match: re.Match[str]) -> str:
    return match[3] or f"{match[1] or ''}\\text{{ {match[2] or match[4]}}}"


def _environments(text: str) -> str:
    r"""Rewrites `\pmatrix{...}` of plain TeX to `\begin{pmatrix}...\end{pmatrix}`."""
    pieces, position = [], 0
    for match in _PLAIN_TEX_MATRIX.finditer(text):
        close = matching_brace(text, match.end())
        if close < 0 or match.start() < position:
            continue
        inside = text[match.end() + 1 : close]
        pieces.append(f"{text[position : match.start()]}\\begin{{{match[1]}}}{inside}\\end{{{match[1]}}}")
        position = close + 1
    return "".join(pieces) + text[position:]


def _brace_powers(text: str) -> str:
    """Rewrites `10^(-3)`, as people type it, to `10^{-3}`."""
    pieces, position = [], 0
    for match in re.finditer(r"\^\s*\(", text):
        close = matching_bracket(text, match.end() - 1)
        if close < 0 or match.start() < position:
            continue
        pieces.append(text[position : match.start()] + "^{" + _brace_powers(text[match.end() : close]) + "}")
        position = close + 1
    return "".join(pieces) + text[position:]


def _plain_functions(text: str) -> str:
    r"""Rewrites `sqrt(2)*pi`, as people type it, to `\sqrt{2}*\pi `."""
    if "\\text" in text:
        return text
    text = _PLAIN_FUNCTION.sub(r"\\\1", text)
    text = _PLAIN_NAME.sub(lambda m: {"infinity": r"\infty "}.get(m[1], f"\\{m[1]} "), text)
    pieces, position = [], 0
    for match in re.finditer(r"\\sqrt\s*\(", text):
        close = matching_bracket(text, match.end() - 1)
        if close < 0 or match.start() < position:
            continue
        pieces.append(text[position : match.start()] + "\\sqrt{" + _plain_functions(text[match.end() : close]) + "}")
        position = close + 1
    return "".join(pieces) + text[position:]


def matching_bracket(text: str, start: int) -> int:
    """Returns the index of the round bracket that closes the bracket at `start`, or -1."""
    depth = 0
    for index in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if depth == 0:
            return index
    return -1


def text_key(normalized: str) -> str:
    """Returns the answer without spaces, except between digits: `1 2` is not `12`."""
    return _IDLE_SPACE.sub("", normalized)


@functools.lru_cache(maxsize=512)  # the responses of a group share their gold answer
def normalize(answer: str) -> str:
    """Returns the answer in its normal spelling: LaTeX commands, no layout, braces around arguments, single spaces."""
    text = _fold_unicode(answer)
    if marked := _MARKDOWN.fullmatch(text.strip()):
        text = marked[2]
    text = _HTML_SCRIPT.sub(lambda m: ("^" if m[1] == "sup" else "_") + "{" + m[2] + "}", text)
    text = _THOUSANDS_BRACES.sub(lambda m: "," if "," in m[0] and not m[0].startswith("\\,") else "", text)
    text = _COLON.sub(":", _ROW_END.sub(r"\\newrow ", text)).replace(r"\(", " ").replace(r"\)", " ")
    text = text.replace(r"\[", " ").replace(r"\]", " ")
    text = (
        text.replace(r"\$", r"\dollar ")
        .replace("$", "")
        .replace(r"\%", "%")
        .replace(r"\#", "#")
        .replace(r"\&", " and ")
    )
    text = _SPACING_SYMBOL.sub(" ", text.replace(r"\!", ""))
    text = _COLOR.sub(" ", _MEASURED_SPACE.sub(" ", text))
    text = re.sub(r"(?<=[\d})])\s*\\q?quad\s*(?=[A-Za-z](?:_\{?\w\}?)?\s*=)", ", ", text)
    text = re.sub(r"\\q?quad(?=[A-Za-z])", " ", text)
    text = _UPRIGHT_POWER.sub(r"\1}^{\2}", _SIUNITX.sub(_siunitx, _environments(text)))
    text = unit_vectors(_COMMAND.sub(_rename_command, text))
    text = _UPRIGHT_UNIT.sub(
        lambda m: m[2] if m[2] not in UNIT_LETTERS and m[2] != "min" else f"{m[1]}\\text{{{m[2]}}}", text
    )
    text = _UPRIGHT_LETTER.sub(r"\1", _UPRIGHT.sub(_upright, text))
    text = _UNIT_FRACTION.sub(r"\\text{\1/\2}", _unwrap(text))
    text = _ORDINAL.sub(r"\1", text)
    text = _FUNCTION_IN_TEXT.sub(r"\\\1 ", text)
    text = _NUMERAL_IN_TEXT.sub(r"\1\2", _PHANTOM.sub(" ", text))
    text = re.sub(r"\\overline\s*\{\s*([A-Z]{2,8})\s*\}", r"\1", text)  # the segment AB, the numeral ABC
    text = _DEGREE.sub(r"\\degree ", text)
    text = usual_notation(text)
    text = text.replace("!=", r"\ne ").replace("<=", r"\le ").replace(">=", r"\ge ").replace("**", "^")
    text = _plain_functions(_brace_powers(text))
    text = _brace_fractions(text)
    text = _BARE_ROOT.sub(lambda m: f"\\sqrt{m[1] or ''}{{{m[2]}}}", text)
    text = _SET_ARGUMENT.sub(r"\\\1(\2)", _CHOOSE.sub(r"\\binom{\1}{\2}", text))
    text = _SPACES.sub(" ", _PREAMBLE.sub("", text)).strip()
    text = _SPACED_THOUSANDS.sub(lambda m: m[0].replace(" ", ""), text)
    return _strip_end(without_phrases(text))


def _strip_end(text: str) -> str:
    """Removes separators at the end and braces around the whole text."""
    while True:
        before = text
        text = text.strip().lstrip("&").rstrip(",;:").removesuffix("\\newrow").strip()
        if text.endswith(".") and not text.endswith(".."):
            text = text[:-1].rstrip()
        if text.startswith("{") and matching_brace(text, 0) == len(text) - 1 and "," not in text:
            text = text[1:-1]
        if text == before:
            return text
