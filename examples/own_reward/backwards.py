"""A task that is not mathematics: a word written backwards, with credit for the letters at their place.

python backwards.py DIRECTORY      # writes prompts.jsonl, heldout.jsonl and demonstrations.jsonl
"""

import json
import random
import string
import sys
from pathlib import Path

from pydantic import BaseModel


class Credit(BaseModel):
    """Credit of a response that is not right."""

    partial: bool = True
    """Whether letters at their place count."""


def reward(*, gold_answer, response, stopped, settings: Credit, **_):
    """Returns 1 for the word backwards, else the share of letters at their place, or 0."""
    if not stopped or response == gold_answer:
        return float(stopped)
    same = sum(a == b for a, b in zip(response, gold_answer, strict=False))
    return same / (len(gold_answer) + 1) if settings.partial else 0.0


def main(directory: Path) -> None:
    """Writes the data. Two letters are exchanged in half of the demonstrations, so there is something to learn."""
    directory.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    words = sorted({"".join(rng.choices(string.ascii_lowercase[:8], k=rng.randint(4, 6))) for _ in range(6000)})
    rng.shuffle(words)
    prompts = [{"question": f"Write {word} backwards.", "gold_answer": word[::-1]} for word in words]
    demonstrations = []
    for prompt in prompts[640:]:
        letters = list(prompt["gold_answer"])
        if rng.random() < 0.5:
            place = rng.randrange(len(letters) - 1)
            letters[place : place + 2] = letters[place : place + 2][::-1]
        demonstrations.append({"question": prompt["question"], "response": "".join(letters)})
    parts = {"heldout": prompts[:128], "prompts": prompts[128:640], "demonstrations": demonstrations}
    for name, records in parts.items():
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
