"""Arithmetic problems with worked solutions, generated: a task that a small model learns in minutes."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from oreal_megatron.config import ArithmeticConfig
from oreal_megatron.seeds import derive_seed
from oreal_megatron.types import Prompt


@dataclass(frozen=True)
class Demonstration:
    """A question with a worked response, for supervised fine-tuning."""

    question: str
    response: str


@dataclass(frozen=True)
class ArithmeticData:
    """Sets of generated problems, no two of which have a problem in common."""

    train: tuple[Prompt, ...]
    heldout: tuple[Prompt, ...]
    demonstrations: tuple[Demonstration, ...]


def generate_arithmetic(config: ArithmeticConfig, seed: int) -> ArithmeticData:
    """Draws distinct expressions, the held-out set first, so that it stays the same when the other sets grow.

    Raises:
        ValueError: fewer distinct problems were found than the configuration asks for.
    """
    rng = random.Random(derive_seed(seed, "arithmetic"))
    wanted = config.num_heldout + config.num_train + config.num_demonstrations
    expressions: dict[str, None] = {}
    for _ in range(50 * wanted):
        if len(expressions) == wanted:
            break
        expressions.setdefault(_expression(config, rng))
    else:
        raise ValueError(
            f"data.arithmetic: found {len(expressions)} distinct problems where {wanted} are needed; raise "
            "data.arithmetic.max_operand or max_terms, or lower num_train, num_heldout or num_demonstrations"
        )
    drawn = list(expressions)
    heldout = drawn[: config.num_heldout]
    train = drawn[config.num_heldout : config.num_heldout + config.num_train]
    shown = drawn[config.num_heldout + config.num_train :]
    demonstrations = [_demonstration(config, e, rng) for e in shown]
    return ArithmeticData(
        train=tuple(_prompt("train", index, expression) for index, expression in enumerate(train)),
        heldout=tuple(_prompt("heldout", index, expression) for index, expression in enumerate(heldout)),
        demonstrations=tuple(demonstrations),
    )


def worked_solution(expression: str, take_leftmost: Callable[[], bool] = lambda: False) -> str:
    r"""Reduces an expression by an operation per line, products first, then left to right, and boxes the value.

    take_leftmost: asked at each line where a product is not the leftmost operation; True takes the leftmost, wrongly.

    >>> print(worked_solution("12-2*3"))
    2*3=6
    12-6=6
    \boxed{6}
    """
    terms, operators = _parse(expression)
    lines = []
    while operators:
        index = operators.index("*") if "*" in operators else 0
        if index > 0 and take_leftmost():
            index = 0
        left, operator, right = terms[index], operators.pop(index), terms.pop(index + 1)
        terms[index] = {"+": left + right, "-": left - right, "*": left * right}[operator]
        lines.append(f"{left}{operator}{right}={terms[index]}")
    return "\n".join([*lines, f"\\boxed{{{terms[0]}}}"])


def _expression(config: ArithmeticConfig, rng: random.Random) -> str:
    operators = [rng.choice(config.operators) for _ in range(rng.randint(config.min_terms, config.max_terms) - 1)]
    around = zip(["+", *operators], [*operators, "+"], strict=True)
    terms = [rng.randint(1, config.max_factor if "*" in pair else config.max_operand) for pair in around]
    return str(terms[0]) + "".join(f"{op}{term}" for op, term in zip(operators, terms[1:], strict=True))


def _parse(expression: str) -> tuple[list[int], list[str]]:
    operators = [character for character in expression if not character.isdigit()]
    digits = "".join(character if character.isdigit() else " " for character in expression)
    return [int(term) for term in digits.split()], operators


def _direct_share(config: ArithmeticConfig, expression: str) -> float:
    shortest, longest = config.direct_shares
    way = (len(_parse(expression)[0]) - config.min_terms) / max(config.max_terms - config.min_terms, 1)
    return shortest + way * (longest - shortest)


def _demonstration(config: ArithmeticConfig, expression: str, rng: random.Random) -> Demonstration:
    if rng.random() < _direct_share(config, expression):
        return Demonstration(_question(expression), worked_solution(expression).rpartition("\n")[2])
    share = config.wrong_order_share
    return Demonstration(_question(expression), worked_solution(expression, lambda: share > 0 and rng.random() < share))


def _question(expression: str) -> str:
    return f"Compute {expression}."


def _prompt(name: str, index: int, expression: str) -> Prompt:
    gold = worked_solution(expression).rpartition("{")[2].rstrip("}")
    return Prompt(id=f"{name}-{index:05d}", question=_question(expression), gold_answer=gold)
