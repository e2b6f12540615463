"""The layouts and options that must give one rank's numbers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from oreal_megatron.config import ParallelConfig


@dataclass(frozen=True)
class Case:
    """One layout with its options, and what it trains on."""

    layout: str
    world: int
    """Processes."""
    parallel: ParallelConfig
    options: tuple[str, ...] = ()
    tied: bool = False
    num_sequences: int = 7
    """Odd; fewer than the data-parallel ranks leave a rank without any."""
    saved_by: Case | None = None
    """The layout that trains the first step; this layout continues from its checkpoint."""

    @property
    def name(self) -> str:
        ties = ("tied",) if self.tied else ()
        name = "-".join((self.layout, *self.options, *ties, f"{self.num_sequences}seq"))
        return f"{self.saved_by.name} > {name}" if self.saved_by else name


PACKED, ONE_BY_ONE = 48, 1
"""Token budgets: a few sequences a micro-batch, or one."""


def parallel(**values: Any) -> ParallelConfig:
    return ParallelConfig(**{"tensor": 1, "pipeline": 1, "micro_batch_tokens": PACKED, **values})


ONE_RANK = Case("one", 1, parallel(micro_batch_tokens=10_000))

LAYOUTS: dict[int, dict[str, ParallelConfig]] = {
    2: {
        "TP2": parallel(tensor=2),
        "PP2": parallel(pipeline=2),
        "VPP2": parallel(pipeline=2, virtual_pipeline=2),
        "CP2": parallel(context=2),
        "DP2": parallel(),
    },
    4: {
        "TP2xPP2": parallel(tensor=2, pipeline=2),
        "TP2xDP2": parallel(tensor=2),
        "PP2xDP2": parallel(pipeline=2),
        "TP2xVPP2": parallel(tensor=2, pipeline=2, virtual_pipeline=2),
        "VPP2xCP2": parallel(pipeline=2, virtual_pipeline=2, context=2),
        "TP4": parallel(tensor=4),
        "PP4": parallel(pipeline=4),
        "VPP2xDP2": parallel(pipeline=2, virtual_pipeline=2),
        "TP2xCP2": parallel(tensor=2, context=2),
        "PP2xCP2": parallel(pipeline=2, context=2),
        "CP2xDP2": parallel(context=2),
        "CP4": parallel(context=4),
        "DP4": parallel(),
    },
    8: {
        "TP2xPP2xDP2": parallel(tensor=2, pipeline=2),
        "TP2xPP2xCP2": parallel(tensor=2, pipeline=2, context=2),
        "TP2xCP2xDP2": parallel(tensor=2, context=2),
        "TP2xVPP2xDP2": parallel(tensor=2, pipeline=2, virtual_pipeline=2),
        "TP2xVPP2xCP2": parallel(tensor=2, pipeline=2, virtual_pipeline=2, context=2),
        "VPP2xCP2xDP2": parallel(pipeline=2, virtual_pipeline=2, context=2),
        "TP4xPP2": parallel(tensor=4, pipeline=2),
        "PP4xDP2": parallel(pipeline=4),
    },
}
OPTIONS: dict[str, dict[str, Any]] = {
    "sp": {"sequence": True},
    "one_by_one": {"micro_batch_tokens": ONE_BY_ONE},
    "full_recompute": {"recompute": "full"},
    "selective_recompute": {"recompute": "selective"},
    "distopt": {"distributed_optimizer": True},
    "overlap": {"overlap_grad_reduce": True},
    "offload": {"offload": True},
}


def with_options(case: Case, *options: str) -> Case:
    update = {key: value for option in options for key, value in OPTIONS[option].items()}
    return replace(case, parallel=case.parallel.model_copy(update=update), options=case.options + options)


def every_case(world: int) -> Iterator[Case]:
    """The product of layouts, options and data for `world` processes; of 8, which two cores are slow with, a choice."""
    if world == 8:
        yield from covering_cases(world)
        return
    optimizers: tuple[tuple[str, ...], ...] = ((), ("distopt", "overlap"), ("distopt", "offload"))
    recomputes: tuple[tuple[str, ...], ...] = ((), ("full_recompute",), ("selective_recompute",))
    for name, layout in LAYOUTS[world].items():
        sequences: tuple[tuple[str, ...], ...] = ((), ("sp",)) if layout.tensor > 1 else ((),)
        packings: tuple[tuple[str, ...], ...] = ((), ("one_by_one",))
        for tied, *options in itertools.product((False, True), sequences, packings, recomputes, optimizers):
            yield with_options(Case(name, world, layout, tied=tied), *itertools.chain(*options))
        yield Case(name, world, layout, num_sequences=1)


def covering_cases(world: int) -> Iterator[Case]:
    """Of the product: every layout with everything on; the first three plain too, with both kinds of
    embeddings; on two processes every option alone, and a rank without sequences."""
    alone = [name for name in OPTIONS if name != "sp"]
    for index, (name, layout) in enumerate(LAYOUTS[world].items()):
        sequence = ("sp",) if layout.tensor > 1 else ()
        plain = Case(name, world, layout, tied=index % 2 == 1)
        turned = replace(plain, tied=not plain.tied)
        yield with_options(turned, *sequence, "one_by_one", "full_recompute", "distopt", "overlap")
        if world == 2 or index < 3:
            yield plain
        if world == 2:
            yield with_options(turned, alone[index % len(alone)])
        if world == 2 and sequence:
            yield with_options(plain, "sp", "selective_recompute", "offload")
    yield Case(f"DP{world}", world, parallel(), num_sequences=1)


def moves(pairs: Sequence[tuple[str, str]]) -> Iterator[Case]:
    """A step on the first layout of each pair, then one on the second; a layout has its options behind a `+`."""
    by_name = {name: Case(name, world, layout) for world, some in LAYOUTS.items() for name, layout in some.items()}

    def parsed(text: str, tied: bool) -> Case:
        name, *options = text.split("+")
        return replace(with_options(by_name.get(name, ONE_RANK), *options), tied=tied)

    for index, (before, after) in enumerate(pairs):
        tied = index % 2 == 1
        yield replace(parsed(after, tied), saved_by=parsed(before, tied))


SOME_MOVES = (
    ("TP2xPP2+sp+distopt", "PP2xDP2+distopt+overlap"),
    ("PP2xDP2+distopt", "TP2xPP2+distopt"),
    ("VPP2xCP2+distopt", "TP2xDP2+distopt+offload"),
)
EVERY_MOVE = (
    *SOME_MOVES,
    ("TP2xPP2", "PP2xDP2"),
    ("PP2xDP2", "TP2xPP2"),
    ("DP4+distopt", "one+distopt"),
    ("one", "TP4"),
    ("DP4+distopt+offload", "TP2xVPP2+distopt"),
    ("TP2xVPP2", "VPP2xDP2+offload"),
    ("PP4", "CP4"),
    ("DP2", "DP4+distopt"),
    ("DP4+distopt", "DP2"),
)
