"""The records that cross a stage: plain, frozen, without torch.

One step turns them into each other from top to bottom:

    Prompt -> Rollout -> GradedRollout -> Trajectory -> (data.packing.TokenBatch) -> StepReport
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


class Verdict(enum.StrEnum):
    """What verification says of a response. UNDECIDED is a value of its own and never becomes a reward."""

    CORRECT = "CORRECT"
    INCORRECT = "INCORRECT"
    UNDECIDED = "UNDECIDED"


class FinishReason(enum.StrEnum):
    """Why generation of a response ended."""

    STOP = "stop"  # the response ends with the stop token, which is one of its tokens
    LENGTH = "length"  # the token limit or the context ended it


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One problem of the prompt stream."""

    id: str
    """Unique in the data set, stable over runs."""
    question: str
    gold_answer: str
    pass_rate: float | None = None
    """Share of the initial policy's responses that are correct, in [0, 1]; None where it was never estimated."""


@dataclass(frozen=True, kw_only=True)
class WeightSpan:
    """Which weights generated the tokens `start` to `end` (exclusive) of a response."""

    version: int
    """The number of policy updates before them."""
    start: int
    end: int


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One finished response to one prompt."""

    prompt: Prompt
    sample_index: int
    """0 .. K-1 within the prompt's group."""
    prompt_ids: tuple[int, ...]
    """Token ids of the rendered prompt."""
    response_ids: tuple[int, ...]
    """Token ids of the response, the stop token included where there is one."""
    logprobs: tuple[float, ...]
    """Nats, one a response token: log softmax(logits / temperature), before top-p."""
    text: str
    """The response as text, without the stop token."""
    finish_reason: FinishReason
    weight_spans: tuple[WeightSpan, ...]
    """Which weights generated which tokens: in order, without a gap, each older than the next."""

    @property
    def id(self) -> str:
        """Unique within a step."""
        return f"{self.prompt.id}#{self.sample_index}"

    def num_older_tokens(self, version: int) -> int:
        """Response tokens, all at its start, that weights older than `version` have generated."""
        return max((span.end for span in self.weight_spans if span.version < version), default=0)


@dataclass(frozen=True, kw_only=True)
class GradeRequest:
    """What a verifier is asked: does this response answer the question with the gold answer?"""

    question: str
    gold_answer: str
    response: str
    """The response as text, without the stop token."""
    stopped: bool
    """Whether the response ended with the stop token."""


@dataclass(frozen=True, kw_only=True)
class Grade:
    """What a verifier answers."""

    verdict: Verdict
    reason: str
    """Why, in words for a person."""
    stage: str
    """Which stage decided: `stop`, `extract`, `rules`, `judge`, ..."""
    seconds: float = 0.0
    """Wall time that this verdict took."""


@dataclass(frozen=True, kw_only=True)
class GradedRollout:
    """A rollout with its grade."""

    rollout: Rollout
    grade: Grade

    @property
    def verdict(self) -> Verdict:
        return self.grade.verdict

    @property
    def is_correct(self) -> bool:
        return self.grade.verdict is Verdict.CORRECT

    def to_json(self) -> dict[str, Any]:
        # Shallow: `asdict` copies every token and log-probability one by one.
        return {
            **vars(self.rollout),
            "prompt": dict(vars(self.rollout.prompt)),
            "weight_spans": [dict(vars(span)) for span in self.rollout.weight_spans],
            "grade": dict(vars(self.grade)),
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> GradedRollout:
        """The inverse of `to_json`; keys beyond it are left alone. Raises KeyError, TypeError or ValueError."""
        return cls(
            rollout=Rollout(
                prompt=Prompt(**record["prompt"]),
                sample_index=record["sample_index"],
                prompt_ids=tuple(record["prompt_ids"]),
                response_ids=tuple(record["response_ids"]),
                logprobs=tuple(record["logprobs"]),
                text=record["text"],
                finish_reason=FinishReason(record["finish_reason"]),
                weight_spans=tuple(WeightSpan(**span) for span in record["weight_spans"]),
            ),
            grade=Grade(**{**record["grade"], "verdict": Verdict(record["grade"]["verdict"])}),
        )


def decided(graded: Iterable[GradedRollout]) -> list[GradedRollout]:
    """Returns the rollouts whose verdict is not UNDECIDED, in order."""
    return [item for item in graded if item.verdict is not Verdict.UNDECIDED]


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """A response that was selected for training."""

    rollout: Rollout
    correct: bool
    advantage: float
    """Shaped reward A of the response, from its whole group."""

    @property
    def id(self) -> str:
        return self.rollout.id


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """Everything that one step says of itself; flattened to `section/name` keys wherever it is logged."""

    step: int
    """0-based; step s is the s-th draw from the prompt stream."""
    skipped: str | None = None
    """Why the step updated nothing, or None."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """`section/name` -> value; sections: rollout, reward, loss, policy, reward_model, data, publication."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Wall seconds by phase: generate, verify, score, reward_model, policy, publish, total."""
    peak_gib: Mapping[str, float] = field(default_factory=dict)
    """The peak of memory by phase, on the process that needed most: allocated on its GPU, or its resident set."""

    def to_json(self) -> dict[str, Any]:
        return {"kind": "step", **asdict(self)}


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A set of prompts that a run is evaluated on."""

    name: str
    prompts: tuple[Prompt, ...]
    samples: int
    """k of avg@k and pass@k; 0: greedy responses only."""


@dataclass(frozen=True, kw_only=True)
class EvaluationReport:
    """The policy on every benchmark after `step` steps."""

    step: int
    metrics: Mapping[str, float]
    """`benchmark/name` -> value: greedy_pass@1, avg@k and pass@k in [0, 1], response_tokens, reward_model_auc."""
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return {"kind": "evaluation", **asdict(self)}


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One generated response, or its beginning."""

    token_ids: tuple[int, ...]
    """The stop token included where there is one."""
    logprobs: tuple[float, ...]
    """Nats: log softmax(logits / temperature) of each token, before top-p; at temperature 0, of the plain logits."""
    finish_reason: FinishReason | None
    """None: it was broken off, and can go on from there."""
    weight_spans: tuple[WeightSpan, ...]
    """Which weights generated which tokens."""

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "weight_spans": [dict(vars(span)) for span in self.weight_spans]}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Completion:
        """The inverse of `to_json`. Raises KeyError, TypeError or ValueError."""
        reason = record["finish_reason"]
        return cls(
            token_ids=tuple(record["token_ids"]),
            logprobs=tuple(record["logprobs"]),
            finish_reason=None if reason is None else FinishReason(reason),
            weight_spans=tuple(WeightSpan(**span) for span in record["weight_spans"]),
        )


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One response to generate."""

    prompt_ids: tuple[int, ...]
    seed: int
    """Fixes the response's randomness, whatever it is batched with."""
    max_new_tokens: int
    """Of the whole response."""
    partial: Completion | None = None
    """What an earlier step has of the response, which goes on from there; a finished one is the answer."""
