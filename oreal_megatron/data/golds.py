"""Faults of gold answers that show in their text: nothing, a phrase, or a whole solution in the place of an answer."""

from __future__ import annotations

import logging
import re
import shlex
from collections import Counter
from collections.abc import Sequence

from oreal_megatron.types import Prompt
from oreal_megatron.verifier.extract import gold_value
from oreal_megatron.verifier.rules import has_words_of_a_sentence

logger = logging.getLogger(__name__)

EMPTY, SOLUTION, PHRASE = "empty gold answer", "whole solution as gold answer", "phrase as gold answer"
"""Faults of a gold answer."""
MAX_FAULTY_SHARE = 0.2
"""Largest share of faulty gold answers with which a run starts."""
_SOLUTION_WORDS = 12
_AROUND_AN_ANSWER = re.compile(r"\\boxed|\\fbox|\\[\[\]()]|[^\w\\]")
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")


def gold_fault(gold: str) -> str | None:
    r"""Returns the fault of a gold answer; None where there is none.

    A solution has working before the answer that `####` or a box marks, such as `2+2=4 #### 4`, or goes over several
    lines of words. A phrase has six words or more. The verifier reads the marked answer of a solution.
    """
    text = gold.strip()
    if not text:
        return EMPTY
    value = gold_value(text)
    is_marked = value != text and ("####" in text or "\\boxed" in text or "\\fbox" in text)
    if is_marked and _AROUND_AN_ANSWER.sub("", text.replace(value, "", 1)):
        return SOLUTION
    if "\n" in text and len(_WORD.findall(text)) >= _SOLUTION_WORDS:
        return SOLUTION
    return PHRASE if has_words_of_a_sentence(value) else None


def check_golds(prompts: Sequence[Prompt], source: str, *, phrases_are_judged: bool) -> None:
    """Logs how many training prompts have a solution or a phrase as gold answer; refuses more than MAX_FAULTY_SHARE.

    source: key and file, for the message. phrases_are_judged: whether a judge compares phrases.

    Raises:
        ValueError: the share is larger; the message has counts, an example, and the commands that help.
    """
    named = (SOLUTION,) if phrases_are_judged else (SOLUTION, PHRASE)
    faulty = [(fault, prompt) for prompt in prompts if (fault := gold_fault(prompt.gold_answer)) in named]
    if not faulty:
        return
    counts = Counter(fault for fault, _ in faulty)
    shares = ", ".join(f"{count} of {len(prompts)} prompts have a {fault}" for fault, count in counts.items())
    first = faulty[0][1]
    path = shlex.quote(source.partition(" = ")[2])
    message = (
        f"{source}: {shares} (first: {first.id}, {first.gold_answer[:80]!r}), and the verifier compares final answers. "
        f"Take them from the solutions: oreal-data import {path} --field question=question "
        "--field gold_answer=gold_answer --final-answer --output new.jsonl; or leave the prompts out: "
        f"oreal-data check {path} --output new.jsonl"
    )
    if len(faulty) > MAX_FAULTY_SHARE * len(prompts):
        raise ValueError(message)
    logger.warning("%s", message)
