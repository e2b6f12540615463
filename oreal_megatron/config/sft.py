"""The section of supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from oreal_megatron.config.fields import AsPath, FileName, Positive, PositiveFloat, Section, Text
from oreal_megatron.config.optimizer import AdamWConfig


class SourceConfig(Section):
    """Records of the source NAME."""

    path: Text
    """JSONL, JSON, Parquet or Arrow file, or the directory of a data set."""
    split: Text | None = None
    """Split of a data set's directory. null: train, or the only split."""
    weight: PositiveFloat = 1.0
    """Number of times that each record occurs in an epoch. 0.5: an epoch has half of the records, and the next epoch
    the other half."""


class HeldoutConfig(Section):
    """Held-out records, whose loss is measured at every evaluation. null: none."""

    path: Text
    """JSONL, JSON, Parquet or Arrow file, or the directory of a data set."""
    split: Text | None = None
    """Split of a data set's directory. null: train, or the only split."""
    limit: Positive | None = None
    """Number of records, from the start, that are used. null: all."""


class SftConfig(Section):
    """Supervised fine-tuning: the whole run with `run.mode: sft`, otherwise a warm start before step 0. null: none."""

    steps: Positive | None
    """Number of updates. null: as many as sft.epochs has."""
    epochs: PositiveFloat | None = None
    """Number of passes over the records, a part of one included. null: sft.steps is the length."""
    batch_size: Positive
    """Conversations in an update."""
    demonstrations: Text | None
    """JSONL, JSON, Parquet or Arrow file, or the directory of a data set. A record has messages (a list of role and
    content), or question and response, or prompt and response. null: those of sft.sources, or without these the worked
    solutions of data.arithmetic."""
    sources: Mapping[FileName, Annotated[SourceConfig, AsPath]] | None = None
    """Several sources by name, each a path or a path with a weight, in the place of sft.demonstrations. null: none."""
    heldout: Annotated[HeldoutConfig | None, AsPath] = None
    turns: Literal["assistant", "last_assistant"] = "assistant"
    """Turns that the loss is on: every turn of the assistant, or its last turn alone. A message with `"weight": 0` is
    always without loss."""
    overlong: Literal["refuse", "drop", "truncate"] = "refuse"
    """Treatment of conversations with more tokens than model.max_sequence_length, which are counted. refuse: the run
    does not start; drop: they are left out; truncate: they are cut off at that length, without an end of the turn."""
    optimizer: AdamWConfig
    """Optimizer of fine-tuning."""

    @property
    def paths(self) -> dict[str, str]:
        """Files and directories that are read, by key."""
        paths = {"sft.demonstrations": self.demonstrations, "sft.heldout.path": self.heldout and self.heldout.path}
        paths |= {f"sft.sources.{name}.path": source.path for name, source in (self.sources or {}).items()}
        return {key: path for key, path in paths.items() if path is not None}
