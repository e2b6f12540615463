"""The package's docstrings open with a verb or a noun phrase, and use plain words (CONTRIBUTING.md, Prose)."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import oreal_megatron

PACKAGE = Path(oreal_megatron.__file__).parent
ROOMS = sorted({path.relative_to(PACKAGE).parts[0] for path in PACKAGE.rglob("*.py")})

# Words that leave the reader without a subject, or that the field does not use for what they stand for here.
UNCLEAR = re.compile(
    r"\b(eats?|told|anew|beside|whoever|nobody|somebody|had back|gives? up what|as yet|thereby|whereby|hither)\b",
    re.IGNORECASE,
)
# A docstring that opens with one of these has no head noun and no verb: a reader has to guess what it is about.
FRAGMENT = re.compile(
    r"(Of|What|Who|Whom|Whose|Those|Such|One|Ones|Else|It|Its|Until|Told|By|As|That|This|These|So|And|But|Or|In|On|At|To|"
    r"From|With|Without|After|Before|Where|When|While|How|Why|If|Because|Only|Also|Then|Here|There|None|Nothing|For)\b"
)


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of every docstring of a module, of its classes, functions and annotated fields."""
    for node in ast.walk(ast.parse(path.read_text())):
        body = getattr(node, "body", None)
        if not isinstance(body, list):
            continue
        for index, statement in enumerate(body):
            if not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)):
                continue
            is_first = index == 0 and isinstance(
                node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
            )
            is_field = index > 0 and isinstance(body[index - 1], ast.Assign | ast.AnnAssign)
            if isinstance(statement.value.value, str) and (is_first or is_field):
                yield statement.lineno, statement.value.value


def problems(path: Path) -> Iterator[str]:
    for line, text in texts(path):
        where = f"{path.relative_to(PACKAGE.parent)}:{line}"
        if match := FRAGMENT.match(text):
            yield f"{where}: opens with {match[0]!r}: {text.splitlines()[0]}"
        for match in UNCLEAR.finditer(text):
            yield f"{where}: {match[0]!r} in: {text[max(match.start() - 40, 0) : match.end() + 40]!r}"


@pytest.mark.parametrize("room", ROOMS)
def test_docstrings_open_with_a_verb_or_a_noun_and_use_plain_words(room):
    place = PACKAGE / room
    found = [line for path in ([place] if place.is_file() else sorted(place.rglob("*.py"))) for line in problems(path)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("text", ["Of a launched one that runs.", "What the worker shall do.", "Asks nobody."])
def test_examples_of_unclear_docstrings_are_found(tmp_path, monkeypatch, text):
    monkeypatch.setattr("tests.unit.test_prose.PACKAGE", tmp_path)
    (tmp_path / "room.py").write_text(f'"""{text}"""\n')
    assert list(problems(tmp_path / "room.py"))
