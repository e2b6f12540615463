"""Section `data` of the configuration: training prompts, their sources and their difficulty."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from oreal_megatron.config.fields import (
    AsPath,
    AsTuple,
    FileName,
    NonNegative,
    Positive,
    PositiveFloat,
    Section,
    Share,
    Text,
)


class ArithmeticConfig(Section):
    """Generated arithmetic problems with worked solutions."""

    num_train: Positive
    """Number of training problems."""
    num_heldout: Positive
    """Number of problems for evaluation."""
    num_demonstrations: Positive
    """Number of worked solutions for the warm start, drawn separately from the two problem sets."""
    direct_shares: Annotated[tuple[Share, Share], AsTuple]
    """Shares of the demonstrations that state the answer without working: at min_terms, and at max_terms. Between the
    two the share changes linearly."""
    wrong_order_share: Share
    """Share of the demonstrations' lines that take the leftmost operation where a multiplication comes first, so that
    the line, and most often the answer, is wrong. Above 0 the problems have a step that decides."""
    min_terms: Annotated[int, Field(ge=2, le=6)]
    """Fewest terms of a problem."""
    max_terms: Annotated[int, Field(ge=2, le=6)]
    """Most terms of a problem."""
    max_operand: Annotated[int, Field(ge=2, le=999)]
    """Largest operand of an addition or subtraction."""
    max_factor: Annotated[int, Field(ge=2, le=99)]
    """Largest operand of a multiplication."""
    operators: Annotated[tuple[Literal["+", "-", "*"], ...], AsTuple, Field(min_length=1)]
    """Operators that problems use."""


class PassRateConfig(Section):
    """Estimation of pass rates with the initial policy, for prompts whose data have none."""

    samples: Positive
    """Responses drawn for each prompt."""
    max_prompts: Positive | None
    """Number of prompts that are estimated and kept, drawn by run.seed. null: all."""


class BalanceBin(Section):
    """Repetition of prompts with low <= pass rate < high."""

    low: Share
    """Lowest pass rate of the bin."""
    high: Annotated[float, Field(ge=0.0)]
    """Pass rate at which the bin ends; prompts at it are not in the bin."""
    repeat: NonNegative
    """Number of times that each prompt of the bin occurs in an epoch. 0: never."""


class CurriculumConfig(Section):
    """Curriculum: pass rates follow the responses of training, and each epoch is balanced by those of its start."""

    rollout_weight: Annotated[float, Field(gt=0.0, le=1.0)]
    """Weight of a step's share of CORRECT responses in a prompt's new pass rate; the earlier one has the rest."""


class TrainSource(Section):
    """Source NAME of training prompts."""

    path: Text
    """File or directory, as data.train takes it."""
    weight: PositiveFloat | None = None
    """Part of the drawn prompts that come from this source, in proportion to the weights of the others. null, for all
    sources or none: in proportion to their prompts."""


_Source = Annotated[TrainSource, AsPath]
"""A source, which may be given as the path alone."""


def _kind(value: Any) -> str:
    return "SourcesConfig" if isinstance(value, Mapping) else "PathConfig"


# A tag that ends with Config is no part of a key in the message of an error.
TrainData = Annotated[
    Annotated[Text, Tag("PathConfig")] | Annotated[Mapping[FileName, _Source], Tag("SourcesConfig")],
    Discriminator(_kind),
]
"""A path, or sources by name."""


class DataConfig(Section):
    """The stream of training prompts."""

    train: TrainData | None
    """File (JSONL, Parquet, a JSON array) or directory of a data set with question, gold_answer and, optionally,
    pass_rate and id; or several by name: {math: {path: math.jsonl, weight: 2}, code: {path: code.parquet, weight: 1}}.
    null: generated arithmetic, or no prompts where run.num_steps is 0."""
    empty_golds: Literal["skip"] | None = None
    """Treatment of lines without a gold_answer in data.train and in the files of benchmarks. null: refuse the file;
    skip: leave the lines out."""
    arithmetic: ArithmeticConfig | None
    """Generated arithmetic: the prompts where data.train is null, and the held-out problems and demonstrations where no
    file is named for them. null: nothing is generated."""
    prompts_per_step: Positive
    """Number of prompts in a step."""
    pass_rate: PassRateConfig | None
    """Estimation of missing pass rates before the first step. null: none; data.difficulty_balance then needs pass rates
    in the file."""
    difficulty_balance: Annotated[tuple[BalanceBin, ...], AsTuple]
    """Bins of pass rates and how often their prompts occur in an epoch. Prompts outside all bins are dropped. Empty:
    every prompt occurs once."""
    curriculum: CurriculumConfig | None = None
    """Re-estimation of pass rates from the responses of training. null: the pass rates of the start stay."""

    @property
    def train_paths(self) -> dict[str, str]:
        """Files and directories of the training prompts, by the key that names them."""
        if isinstance(self.train, Mapping):
            return {f"data.train.{name}.path": source.path for name, source in self.train.items()}
        return {} if self.train is None else {"data.train": self.train}

    @property
    def source_weights(self) -> dict[str, float] | None:
        """Weights of the sources by name; None where prompts of all sources are drawn alike."""
        sources = self.train if isinstance(self.train, Mapping) else {}
        weights = {name: source.weight for name, source in sources.items() if source.weight is not None}
        return weights or None
