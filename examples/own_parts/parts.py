"""Smaller parts of one's own: the messages of a question, a metric of evaluations, and a tracker."""

from pydantic import BaseModel


class Shots(BaseModel):
    """Solved examples before the question."""

    examples: tuple[tuple[str, str], ...]
    """Pairs of a question and its response."""


def messages(*, question, settings: Shots):
    """Returns the messages of a prompt: the examples as earlier turns, then the question."""
    turns = [turn for example in settings.examples for turn in zip(("user", "assistant"), example, strict=True)]
    return [{"role": role, "content": content} for role, content in [*turns, ("user", question)]]


def lines(*, greedy, **_):
    """Returns the mean number of lines of a benchmark's greedy responses."""
    return sum(graded.rollout.text.count("\n") + 1 for graded in greedy) / len(greedy)


def write_line(*, record, directory):
    """Appends a line for each step and evaluation to a file of its own."""
    metrics = record["metrics"]
    shown = {name: value for name, value in metrics.items() if name.endswith(("pass_rate", "greedy_pass@1"))}
    with (directory / "progress.txt").open("a") as file:
        file.write(f"{record['kind']} {record['step']} {shown}\n")
