"""Writes the raw files of the tutorial: sums in the shape of GSM8K, with the faults that public data sets have.

    python raw_data.py DIRECTORY

train.jsonl has repeated questions, gold answers that cannot be read, records without an answer, and problems of the
benchmark, test.jsonl. worked.jsonl has worked solutions under keys of its own; half of them leave out the working.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterable
from pathlib import Path

from oreal_megatron.config import ArithmeticConfig
from oreal_megatron.data.arithmetic import generate_arithmetic, worked_solution
from oreal_megatron.types import Prompt

SUMS = ArithmeticConfig(
    num_train=1000,
    num_heldout=200,
    num_demonstrations=16000,
    direct_shares=(0.4, 0.6),
    wrong_order_share=0.0,
    min_terms=3,
    max_terms=5,
    max_operand=9,
    max_factor=3,
    operators=("+", "-", "*"),
)


def gsm8k_record(problem: Prompt) -> dict[str, str]:
    """Returns a problem as GSM8K has it: the working, then #### and the gold answer."""
    working = worked_solution(problem.question.removeprefix("Compute ").removesuffix(".")).rpartition("\n")[0]
    return {"question": problem.question, "answer": f"{working}\n#### {problem.gold_answer}"}


def with_faults(records: list[dict[str, str]], benchmark: list[dict[str, str]], rng: random.Random) -> None:
    """Breaks some records, and adds repeated ones and those of the benchmark, in place; shuffles the records."""
    for record in records[:6]:
        record["answer"] = record["answer"].rpartition("####")[0].strip()
    for record in records[6:16]:
        record["answer"] += rng.choice((" = \\frac{", " or so, see the next line of the book"))
    repeated = [{**record, "question": respelled(record["question"], rng)} for record in rng.sample(records[16:], 150)]
    planted = [{**record, "question": respelled(record["question"], rng)} for record in rng.sample(benchmark, 25)]
    records += repeated + planted
    rng.shuffle(records)


def respelled(question: str, rng: random.Random) -> str:
    """Returns the question in another spelling."""
    spellings = (question.upper(), question.replace(".", " ."), question.replace("Compute ", "Compute: "))
    return rng.choice((question, *spellings))


def main(directory: Path) -> None:
    """Writes the files; the same files every time."""
    rng = random.Random(0)
    data = generate_arithmetic(SUMS, 0)
    train, test = ([gsm8k_record(problem) for problem in problems] for problems in (data.train, data.heldout))
    with_faults(train, test, rng)
    worked = [{"sum": {"text": shown.question}, "solution": shown.response} for shown in data.demonstrations]
    directory.mkdir(parents=True, exist_ok=True)
    for name, records in (("train", train), ("test", test), ("worked", worked)):
        write(directory / f"{name}.jsonl", records)


def write(path: Path, records: Iterable[object]) -> None:
    """Writes a record a line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
