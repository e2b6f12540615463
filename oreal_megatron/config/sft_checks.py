"""Checks of supervised fine-tuning across sections."""

from __future__ import annotations

from collections.abc import Iterator

from oreal_megatron.config.cross_checks import CHECKS, check
from oreal_megatron.config.errors import Violation
from oreal_megatron.config.sections import DataConfig, ModelConfig, RunConfig
from oreal_megatron.config.sft import SftConfig

__all__ = ["CHECKS", "check"]


@check("sft", "data")
def _check_records(sft: SftConfig | None, data: DataConfig) -> Iterator[Violation]:
    if sft is None:
        return
    if sft.demonstrations is None and not sft.sources and data.arithmetic is None:
        remedy = "There are no records. Set sft.demonstrations or sft.sources to files, data=arithmetic, or sft=none."
        yield Violation("sft.demonstrations", None, remedy)
    if sft.demonstrations is not None and sft.sources:
        remedy = "sft.sources names records too. Set sft.demonstrations=null, and name the file there."
        yield Violation("sft.demonstrations", sft.demonstrations, remedy)


@check("sft")
def _check_length(sft: SftConfig | None) -> Iterator[Violation]:
    if sft is not None and (sft.steps is None) == (sft.epochs is None):
        remedy = "sft.steps and sft.epochs are both set. Set the other to null."
        if sft.steps is None:
            remedy = "Fine-tuning has no length. Set it, or sft.epochs."
        yield Violation("sft.steps", sft.steps, remedy)


@check("run", "sft", "model")
def _check_mode(run: RunConfig, sft: SftConfig | None, model: ModelConfig) -> Iterator[Violation]:
    if run.mode != "sft":
        if sft is not None and sft.heldout is not None:
            remedy = "A warm start is not evaluated. Set sft.heldout=null, or run.mode=sft."
            yield Violation("sft.heldout.path", sft.heldout.path, remedy)
        return
    if sft is None:
        yield Violation("sft", None, "run.mode=sft needs it. Choose sft=records and set sft.demonstrations.")
    if run.num_steps:
        remedy = "sft.steps or sft.epochs is the length of fine-tuning. Set run.num_steps=0."
        yield Violation("run.num_steps", run.num_steps, remedy)
    if model.reward_model is not None:
        remedy = "Fine-tuning has no reward model. Set model.reward_model=null."
        yield Violation("model.reward_model", model.reward_model, remedy)
