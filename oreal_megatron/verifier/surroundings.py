r"""The text around the final box: operators and negations that change its value, corrections that replace it.

In a formula the box must be a whole side of an equation, apart from units and words. In plain text a sign, a factor, a
relation or a negation next to the box makes it a part of an answer, not an answer.
"""

from __future__ import annotations

import re

_MAX_BEFORE_CHARS = 2_000
_MAX_WORDS_CHARS = 400
_MAX_AFTER_CHARS = 4_000
_MAX_VALUES = 64
_MAX_WRAPPERS = 20

_DELIMITER = re.compile(
    r"\\\\|\\\$|\$\$?|\\[()\[\]]|\\(?P<edge>begin|end)\{(?:equation|align|alignat|gather|multline|eqnarray|math|displaymath)\*?\}"
)
_CLOSING = {"$": "$", "$$": "$$", "\\(": "\\)", "\\[": "\\]", "\\begin": "\\end"}
_ROW_BREAK = re.compile(
    r"\\\\(?:\[[^\]]{1,20}\])?|\\newline|\\(?:begin|end)\{\w{1,20}\*?\}(?:\{[^{}]{0,20}\})?|\n[ \t]*\n"
)
_LAYOUT = "displaystyle|left|right|big|Big|bigg|Bigg|tiny|small|normalsize|large|Large|LARGE|huge|Huge|bf|rm"
_SPACE = rf"(?:\s|[&~]|\\[,;:! ]|\\q?quad(?![A-Za-z])|\\(?:{_LAYOUT})(?![A-Za-z]))"
_SPACE_BEFORE = re.compile(rf"{_SPACE}+\Z")
_SPACE_AFTER = re.compile(rf"\A{_SPACE}+")
_ARGUMENT = re.compile(r"(?:[\^_}\]]|\\[A-Za-z]+|\\)\s*\{\Z")
_IDLE_BEFORE = re.compile(r"(?:</?\w{1,20}>|\*\*)\s*\Z")
_TYPEFACE = re.compile(
    r"\\(?:text|math)?(?:bf|rm|it|tt|normal|text|up|color\s*\{[^{}]{1,20}\}|underline|bm|boldsymbol|fbox|ensuremath"
    r"|displaystyle|large|Large|huge|Huge|centerline)\s*\{\Z"
)
_OPEN_TUPLE = re.compile(r"[(\[][^()\[\]]*[,;]\Z")
_LISTED = re.compile(r"(?:-?\d[\d.]*\s*[,;]\s*)+")
_WORDS_BEFORE = re.compile(r"\\(?:text|mathrm|textrm|textbf|mathbf|mbox)\s*\{([^{}]*)\}\Z")
_END_OF_SIDE = re.compile(
    r"(?:(?<![<>!])=|[:,;.]|\\(?:[$#]|implies|impliedby|iff|[Ll]ong[lr]ightarrow|Long[lr]ightarrow|[Rr]ightarrow|to|mapsto|in|equiv"
    r"|Leftrightarrow|Longleftrightarrow|therefore|because|bullet|star|checkmark|colon|coloneqq|triangleq|euro|pounds|yen)"
    r"|[⇒→∴∵⟹•]|=>|->)\Z"
)
_START_OF_REST = re.compile(
    r"(?:\Z|=|[,;](?!\d)|\.(?!\d)|:(?!\s*\d)|\\(?:text|mathrm|textrm|textbf|textit|mbox|operatorname|rm|tag|label|qed|square|Box"
    r"|blacksquare|checkmark|implies|iff|[Rr]ightarrow|Longrightarrow|because|therefore|degree|pmod|notag|nonumber|lor"
    r"|hspace|vspace|color|approx|simeq|equiv)(?![A-Za-z])"
    r"|\\?%|\^\s*\{?\s*\\(?:circ|degree|text|mathrm|dagger|ast)|°|_|[A-Za-z]{2}|[\u3000-\u9fff□■✓⇒∎。，]"
    r"|\(\s*[A-Za-z]\s*(?:\\(?:in|geq?|leq?|neq?|gt|lt)(?![A-Za-z])|[=<>])"
    r"|[(\[]\s*(?:\\(?:text|because|mbox|mathrm|mod|pmod)|[A-Za-z]{3})|[)}\]])"
)
_OPERATOR_BEFORE = re.compile(
    r"(?:\\(?:cdot|times|pm|mp|div|leq?|leqslant|geq?|geqslant|neq?|lt|gt|not|sqrt|approx|log|ln|sin|cos|tan|ast|pi)"
    r"|(?<!\*)\*|[/^<>≤≥≠±×·÷√+\-−\d)}])\s*\{?\s*\Z"
)
_OPERATOR_AFTER_OPERAND = re.compile(
    r"(?:(?<![A-Za-z\\])[A-Za-z]|\d|\))\s*(?:[+/^≤≥≠±×÷·]|(?<![=-])[<>]|(?<!\*)\*)\s*\Z"
)
_SIGN_BEFORE = re.compile(r"(?:^|[\s(=])[-−+±√]\Z")
_NEGATION_BEFORE = re.compile(
    r"(?:\b(?:not|never|cannot be|neither|rather than|instead of|than|except|excluding|half of|twice|double|minus|"
    r"negative|plus|times|at least|at most|almost|nearly|about|around|approximately|roughly|close to|anything but"
    r"|no longer|between [^.\n]{1,40} and"
    r"|(?:square|cube|root|reciprocal|negative|inverse|opposite|multiple|factor|divisor|half|third|quarter|double) of)"
    r"|n't)(?:\s+(?:equal(?:\s+to)?|be|simply|just))?[\s:*$]*\Z",
    re.IGNORECASE,
)
_OPERATOR_AFTER = re.compile(
    r"(?:[ \t]|\\[,;!])*(?:\}[ \t]*)?(?:\^\s*(?!\{?\s*\\circ)|!(?![\s$]*(?:\n|\Z))|<(?![/|\w])"
    r"|[>≤≥≠±×·÷]|[-−+/][ \t]*[\d\\]"
    r"|[+/*](?=[A-Za-z\d\\(])|\\(?:cdot|times|pm|div|pi|sqrt|frac|leq?|geq?|neq?|binom|lor|log)(?![A-Za-z])"
    r"|[.:]\d|[A-Za-z0-9](?![A-Za-z]))"
)
_NEXT_WORD = re.compile(r"\s+[A-Za-z](?![A-Za-z])|\s*[A-Za-z]\b(?=\s+[a-z]{2,})|\s+\d|[+/*]+[A-Za-z]{2,}")
_OPERATION_IN_WORDS = re.compile(
    r"\s*(?:\$|\\\))?\s*(?:\\text\s*\{\s*)?(?:(?:hundred|thousand|million|billion|trillion|dozen|squared|cubed|doubled"
    r"|tripled|halved|factorial|halves|thirds|fourths|fifths|and an? (?:half|third|fourth|quarter|fifth)"
    r"|or (?:more|less|fewer|so|greater|above|below|higher|lower)|at (?:most|least)|approximately|approx|roughly)\b"
    r"|(?:times|plus|minus|choose|over|divided by)\b(?:\s+or\s+minus)?[\s}]*[$\d\\])",
    re.IGNORECASE,
)
_HYPOTHESIS = re.compile(r"\b(?:if|were|would|unless|suppose|had|mistakes?|whether)\b[^.\n]*\Z", re.IGNORECASE)
_PERCENT_AFTER = re.compile(r"\s*(?:\}\s*)?(?:\$|\\\))?\s*(?:\\?%|per\s?cent\b|\\text\s*\{\s*per\s?cent\s*\})")
_BASE_AFTER = re.compile(r"\s*_\s*(?:\{\s*(?:\\text\s*\{)?([\w ]{1,12})\}{1,2}|(\d))")
_VALUE = (
    r"[$\s*({]*(?:\\\()?(?P<value>-?(?:\d++(?:,\d{3})*+(?:\.\d++)?+(?:/\d++)?+(?:\\?%)?+"
    r"|\\[dt]?frac\s*\{[^{}]*\}\s*\{[^{}]*\}|\\sqrt\s*\{[^{}]*\}))"
)
_SPENT = (
    r"(?![\s$)]*(?:is|are|was|were|does|do|did|fails?|would|will|can|cannot|could|gives?|has|have|leads?|makes?)\b)"
)
_ALTERNATIVE = re.compile(
    r"(?:[\s$)\]}]|\\[)\]])*(?:[.,;]?\s*\(?\s*(?:\\text\s*\{\s*|\\)?\b(?:l?or|and)(?![A-Za-z])\s*\}?"
    r"(?:\s*(?:maybe|perhaps|possibly|even|else|is it|it is))?"
    rf"|[,;]\s*(?:maybe|perhaps|possibly)?)\s*{_VALUE}{_SPENT}",
    re.IGNORECASE,
)
_ALTERNATIVE_BEFORE = re.compile(
    rf"(?<![\w.^_])(?<!not )(?<!not \$){_VALUE}[\s$)}}]*(?:,?\s*(?:\\text\s*\{{\s*)?or\b\s*\}}?|\\lor(?![A-Za-z]))"
    r"[\s$]*(?:\(\s*)?(?:[A-Za-z]\s*=\s*)?\Z"
)
_EQUALITY = re.compile(
    r"\s*=\s*(?P<value>(?:[\d+\-*/^{}().\s]|\\(?:[dt]?frac|sqrt|cdot|times|pi|left|right|%)(?![A-Za-z]))*\d"
    r"(?:[{}().\s!%]|\\%)*)(?:\\text|\\mathrm|[$,;=]|\\[)\]\\]|\Z)"
)
_CORRECTION = re.compile(
    r"(?:\b(?:correction|should (?:be|have been)|i (?:mean|meant)|make (?:that|it)|(?:scratch|strike|change) that"
    r"|actually|replace (?:that|it|this) (?:with|by)|never ?mind|correct (?:this|that|it|myself)|instead"
    r"|on (?:second thoughts?|reflection)|(?:new|correct|right|true|real|final) (?:answer|value|result)"
    r"|answer (?:is|becomes))\b|(?:^|\n)[*\s]*answer\s*:|[.!]\s+answer\s*:)"
    rf"[^\d\n$\\.]{{0,40}}?{_VALUE}{_SPENT}",
    re.IGNORECASE,
)
_SECOND_THOUGHT = re.compile(
    r"(?:\b(?:wait|oops|edit|sorry|hmm+|rather(?! than)|alternatively|instead|update|my bad"
    r"|(?:let me|i(?:'ll| will)) (?:recompute|recheck|recalculate|redo|re-?evaluate)\b(?:[^\d\n.]{0,30}\.)?"
    r"|i made an? (?:mistake|error)(?:[^\d\n.]{0,30}\.)?)(?![A-Za-z])"
    r"|(?:^|[.!?:;(\-–—]\s*|\bwait,?\s+)no\s*[,:.!;]"
    rf"|[.!?]\s+or\b)[^\d\n$\\.]{{0,30}}?{_VALUE}(?:[\s$]*[a-z]{{2,20}})?[\s$*]*(?:[.!?)]|\n|\Z)",
    re.IGNORECASE,
)
_RETRACTION = re.compile(
    r"\b(?:(?:that|this|it|which|the (?:above|answer|box))(?:'s| is| was)\s+"
    r"(?:wrong|incorrect|not (?:right|correct|the answer)|a mistake|false)"
    r"|scratch that|ignore (?:that|this|the above)|i made (?:a|an) (?:mistake|error)"
    r"|(?:not|isn't) the (?:right|correct) answer)\b|\(\s*(?:wrong|incorrect|false|not correct|mistake)\s*\)",
    re.IGNORECASE,
)


_DENIED = re.compile(
    r"[\s$)]*(?:is|was)\s+(?:wrong|incorrect|false|impossible|a mistake|too (?:small|large|big|low|high)"
    r"|not (?:the|a|right|correct))\b",
    re.IGNORECASE,
)


def _open_formula(text: str, start: int) -> tuple[int, int, str] | None:
    """Returns the place of the open delimiter in front of the box, the place behind it, and what closes it."""
    low = max(0, start - _MAX_BEFORE_CHARS)
    low = max(low, text.rfind("\n\n", low, start))
    opened: tuple[int, int, str] | None = None
    for match in _DELIMITER.finditer(text, low, start):
        mark = match[0] if match["edge"] is None else f"\\{match['edge']}"
        if opened is None and mark in _CLOSING:
            opened = (*match.span(), _CLOSING[mark])
        elif opened is not None and mark == opened[2]:
            opened = None
    return opened


def _without_wrappers(before: str, after: str) -> tuple[str, str]:
    r"""Returns the two sides without spaces, typefaces such as `\mathbf{...}`, and brackets around the box alone."""
    for _ in range(_MAX_WRAPPERS):
        before, after = _SPACE_BEFORE.sub("", before), _SPACE_AFTER.sub("", after)
        if (typeface := _TYPEFACE.search(before)) and after[:1] == "}":
            before = before[: typeface.start()]
        elif before.endswith("\\{") and after.startswith("\\}"):
            before, after = before[:-2], after[1:]
        elif before[-1:] + after[:1] in ("()", "[]", "{}") and not _ARGUMENT.search(before):
            before = before[:-1]
        else:
            break
        after = after[1:]
    return before, after


def _is_part_of_formula(before: str, after: str) -> bool:
    """Whether the box is only a part of a side in its row of the formula around it."""
    before, after = _without_wrappers(_ROW_BREAK.split(before)[-1], _ROW_BREAK.split(after, maxsplit=1)[0])
    is_listed = _LISTED.fullmatch(before) or (after[:1] in ")]" and _OPEN_TUPLE.search(before))
    if is_listed or not _START_OF_REST.match(after):
        return True
    if words := _WORDS_BEFORE.search(before):
        return _NEGATION_BEFORE.search(words[1]) is not None
    return bool(before) and _END_OF_SIDE.search(before) is None


def _is_part_of_line(line: str, after: str) -> bool:
    """Whether an operator stands next to a box that is outside of formulas; `line` is what precedes it."""
    if _OPERATOR_AFTER.match(after) and not _NEXT_WORD.match(after):
        return True
    if "$" in line or not re.search(r"\\[A-Za-z]", line):
        # Only a sign that touches the box counts: "- " opens an item of a list.
        return _OPERATOR_AFTER_OPERAND.search(line) is not None
    if words := _WORDS_BEFORE.search(line.rstrip()):
        return _NEGATION_BEFORE.search(words[1]) is not None
    return _OPERATOR_BEFORE.search(_without_wrappers(line, after)[0]) is not None


def is_part_of_expression(text: str, start: int, end: int) -> bool:
    """Whether an operator, a factor, a relation or a negation stands directly around the box at [start, end)."""
    if _OPERATION_IN_WORDS.match(text, end, end + 60):
        return True
    if (formula := _open_formula(text, start)) is not None:
        opening, inside, closing = formula
        after = text[end : end + _MAX_BEFORE_CHARS].replace("\\$", "\\#").partition(closing)[0]
        if _is_part_of_formula(text[inside:start], after):
            return True
        if _SPACE_BEFORE.sub("", text[inside:start]):
            return False
        start = opening
    before = _IDLE_BEFORE.sub("", text[max(0, start - _MAX_WORDS_CHARS) : start])
    if _NEGATION_BEFORE.search(before) or _SIGN_BEFORE.search(before):
        return True
    line = before[max(before.rfind("\n"), before.rfind("&"), before.rfind("\\\\")) + 1 :]
    return formula is None and _is_part_of_line(line, text[end : end + 40])


def _following(text: str, end: int) -> str:
    """Returns the text after the box with single spaces and signs, over which the patterns take linear time."""
    after = re.sub(r"[^\S\n]+", " ", text[end : end + _MAX_AFTER_CHARS])
    return re.sub(r"(?: ?\n ?)+", "\n", re.sub(r"\$+", "$", after))


def withdraws(text: str, end: int) -> bool:
    """Whether the text after the box says that it is wrong."""
    after = _following(text, end)
    if _DENIED.match(after):
        return True
    return any(not _HYPOTHESIS.search(after, 0, match.start()) for match in _RETRACTION.finditer(after))


def with_suffix(text: str, end: int, answer: str) -> str:
    r"""Returns the boxed answer with the percent sign or the base of a numeral that follows the box."""
    if _PERCENT_AFTER.match(text, end, end + 60):
        return answer + r"\text{ percent}"
    base = _BASE_AFTER.match(text, end, end + 60)
    return f"{answer}_{{{base[1] or base[2]}}}" if base else answer


def alternatives_before(text: str, start: int) -> tuple[str, ...]:
    """Returns the value that "or" joins to the box behind it."""
    match = _ALTERNATIVE_BEFORE.search(text, max(0, start - 80), start)
    return (match["value"],) if match else ()


def later_values(text: str, end: int) -> tuple[str, ...]:
    """Returns the values behind the box: equal ones in a chain, alternatives, and corrections."""
    after = _following(text, end)
    values: list[str] = []
    position = 0
    while len(values) < _MAX_VALUES and (match := _ALTERNATIVE.match(after, position)):
        values.append(match["value"])
        position = match.end()
    if equality := _EQUALITY.match(after, 0, 200):
        values.append(equality["value"])
    corrections = (
        match
        for pattern in (_CORRECTION, _SECOND_THOUGHT)
        for match in pattern.finditer(after)
        if not _HYPOTHESIS.search(after, 0, match.start())
    )
    return (*values, *(match["value"] for match in corrections))
