"""Graded rollouts without a model, for tests of what is computed from them."""

from __future__ import annotations

import numpy as np

from oreal_megatron.types import FinishReason, Grade, GradedRollout, Prompt, Rollout, Verdict, WeightSpan


def graded(
    prompt: Prompt,
    index: int,
    verdict: Verdict,
    length: int = 4,
    *,
    answer: str = "",
    text: str = "",
    stopped: bool = True,
) -> GradedRollout:
    rollout = Rollout(
        prompt=prompt,
        sample_index=index,
        prompt_ids=(1,),
        response_ids=np.full(length, 2, np.int32),
        logprobs=np.full(length, -1.0, np.float32),
        text=text,
        finish_reason=FinishReason.STOP if stopped else FinishReason.LENGTH,
        weight_spans=(WeightSpan(version=0, start=0, end=length),),
    )
    return GradedRollout(rollout=rollout, grade=Grade(verdict=verdict, reason="", stage="rules", answer=answer))
