"""Smaller parts of one's own: messages of a question, lengths of responses, a metric of evaluations, and a tracker."""

from pydantic import BaseModel, PositiveInt


class Shots(BaseModel):
    """Solved examples before the question."""

    examples: tuple[tuple[str, str], ...]
    """Pairs of a question and its response."""


def messages(*, question, settings: Shots):
    """Returns the messages of a prompt: the examples as earlier turns, then the question."""
    turns = [turn for example in settings.examples for turn in zip(("user", "assistant"), example, strict=True)]
    return [{"role": role, "content": content} for role, content in [*turns, ("user", question)]]


class Growth(BaseModel):
    """Length of responses over the steps."""

    first: PositiveInt
    """Longest response of the first step, in tokens."""
    each_step: PositiveInt
    """Tokens that each further step adds."""


def growing(*, step, sampling, settings: Growth, **_):
    """Returns the limit of a response: short at first, and rollout.sampling.max_new_tokens in the end."""
    return {"max_new_tokens": min(settings.first + settings.each_step * step, sampling.max_new_tokens)}


def lines(*, greedy, **_):
    """Returns the mean number of lines of a benchmark's greedy responses."""
    return sum(graded.rollout.text.count("\n") + 1 for graded in greedy) / len(greedy)


def write_line(*, record, directory):
    """Appends a line for each step and evaluation to a file of its own."""
    metrics = record["metrics"]
    shown = {name: value for name, value in metrics.items() if name.endswith(("pass_rate", "greedy_pass@1"))}
    with (directory / "progress.txt").open("a") as file:
        file.write(f"{record['kind']} {record['step']} {shown}\n")
