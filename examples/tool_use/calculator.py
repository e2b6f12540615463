"""Arithmetic with a calculator, in two turns: the policy writes an expression, reads its value, and answers.

python calculator.py DIRECTORY      # writes prompts.jsonl, heldout.jsonl and demonstrations.jsonl
"""

import json
import random
import re
import sys
from pathlib import Path

from pydantic import BaseModel, PositiveInt


class Calculator(BaseModel):
    """Limits of a call."""

    max_tokens: PositiveInt = 24
    """Tokens of the expression."""


async def solve(*, conversation, settings: Calculator, **_):
    """Writes a response: an expression of the policy's, the calculator's message, and the policy's answer."""
    call = await conversation.generate(settings.max_tokens)
    if call.stopped:
        conversation.append_message("tool", calculated(call.text))
        await conversation.generate()


def calculated(expression: str) -> str:
    """Returns the value of a sum or product of integers, or `error`."""
    if not re.fullmatch(r"\d{1,4}([-+*]\d{1,4}){1,4}", expression):
        return "error"
    return str(eval(re.sub(r"\b0+(?=\d)", "", expression)))  # digits and operators alone


def main(directory: Path) -> None:
    """Writes the data. Two digits are exchanged in half of the demonstrations, so there is something to learn."""
    directory.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    expressions = sorted({f"{rng.randint(12, 98)}{rng.choice('+-*')}{rng.randint(12, 98)}" for _ in range(6000)})
    rng.shuffle(expressions)
    prompts = [{"question": f"Compute {one}.", "gold_answer": calculated(one)} for one in expressions]
    demonstrations = []
    for expression in expressions[640:]:
        call = expression if rng.random() < 0.5 else expression[1] + expression[0] + expression[2:]
        turns = [f"Compute {expression}.", call, calculated(call), rf"\boxed{{{calculated(call)}}}"]
        roles = ["user", "assistant", "tool", "assistant"]
        messages = [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=True)]
        demonstrations.append({"messages": messages})
    parts = {"heldout": prompts[:128], "prompts": prompts[128:640], "demonstrations": demonstrations}
    for name, records in parts.items():
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
