"""Records that cross a stage: plain, frozen, without torch.

A step turns them into each other from top to bottom:

    Prompt -> Rollout -> GradedRollout -> Trajectory -> (data.packing.TokenBatch) -> StepReport
"""

from __future__ import annotations

import enum
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np


class Verdict(enum.StrEnum):
    """Verdict on a response. UNDECIDED never becomes a reward."""

    CORRECT = "CORRECT"
    INCORRECT = "INCORRECT"
    UNDECIDED = "UNDECIDED"


class FinishReason(enum.StrEnum):
    """Reason for which the generation of a response ended."""

    STOP = "stop"  # the last token of the response is the stop token
    LENGTH = "length"  # the token limit or the context ended it


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A problem of the prompt stream."""

    id: str
    """Id that is unique in the data set and the same in every run."""
    question: str
    gold_answer: str
    pass_rate: float | None = None
    """Share of the initial policy's responses that are correct, in [0, 1]; None where it is not estimated."""
    source: str | None = None
    """Name of the prompt's source in data.train; None where data.train names none."""
    response_tokens: float | None = None
    """Mean tokens of the last group of responses that the run has seen to the prompt; None: none yet."""


@dataclass(frozen=True, kw_only=True)
class WeightSpan:
    """Version of the weights that generated the tokens `start` to `end` (exclusive) of a response."""

    version: int
    """Number of publications that led to the weights: one a step that updates the policy."""
    start: int
    end: int


_NO_TOKENS = np.empty(0, np.int32)
_NO_LOGPROBS = np.empty(0, np.float32)


@dataclass(frozen=True, kw_only=True, eq=False)
class Rollout:
    """A finished response to a prompt.

    The main process has all of it; the other processes have it without its tokens, log-probabilities and text.
    """

    prompt: Prompt
    sample_index: int
    """Index within the prompt's group, 0 to K-1."""
    prompt_ids: tuple[int, ...]
    """Token ids of the rendered prompt."""
    response_ids: np.ndarray
    """Token ids of the response, int32 [T], with the stop token if it ends with it."""
    logprobs: np.ndarray
    """Log softmax(logits / temperature) of each response token that the policy generated, fp32 [T] without inserted
    tokens, before top-p, in nats."""
    text: str
    """Text of the response, without the stop token."""
    finish_reason: FinishReason
    weight_spans: tuple[WeightSpan, ...]
    """Spans of tokens by the weights that generated them: in order, without a gap, each older than the next."""
    inserted_spans: tuple[tuple[int, int], ...] = ()
    """Spans (start, end) of response tokens that the policy did not generate, such as a tool's output, in order. They
    have no log-probabilities and are not trained on. Their weight version is that of a neighbour."""

    @property
    def id(self) -> str:
        """Id that is unique within a step."""
        return f"{self.prompt.id}#{self.sample_index}"

    @property
    def num_response_tokens(self) -> int:
        """Number of response tokens T, which every process knows."""
        return self.weight_spans[-1].end if self.weight_spans else 0

    @property
    def num_policy_tokens(self) -> int:
        """Number of response tokens that the policy generated, which every process knows."""
        return self.num_response_tokens - sum(end - start for start, end in self.inserted_spans)

    @property
    def policy_mask(self) -> np.ndarray | None:
        """Response tokens that the policy generated, bool [T]; None: all."""
        if not self.inserted_spans:
            return None
        mask = np.ones(self.num_response_tokens, bool)
        for start, end in self.inserted_spans:
            mask[start:end] = False
        return mask

    @property
    def last_turn_ids(self) -> np.ndarray:
        """Token ids after the last inserted token, int32; the whole response where none was inserted."""
        return self.response_ids[self.inserted_spans[-1][1] if self.inserted_spans else 0 :]

    def without_tokens(self) -> Rollout:
        """Returns the rollout as processes other than the main process have it."""
        return replace(self, response_ids=_NO_TOKENS, logprobs=_NO_LOGPROBS, text="")

    def num_older_tokens(self, version: int) -> int:
        """Number of the policy's tokens, the first of the response, that weights older than `version` generated."""
        end = max((span.end for span in self.weight_spans if span.version < version), default=0)
        return end - sum(max(min(last, end) - first, 0) for first, last in self.inserted_spans)


@dataclass(frozen=True, kw_only=True)
class GradeRequest:
    """Request to a verifier: whether the response answers the question with the gold answer."""

    question: str
    gold_answer: str
    response: str
    """Text of the response, without the stop token."""
    stopped: bool
    """Whether the response ends with the stop token."""


@dataclass(frozen=True, kw_only=True)
class Grade:
    """Answer of a verifier."""

    verdict: Verdict
    reason: str
    """Reason for the verdict, as text for people."""
    stage: str
    """Stage that decided: `stop`, `extract`, `rules`, `judge`, ..."""
    credit: float | None = None
    """Share of the reward of a CORRECT response, in [0, 1]; None: 1 for CORRECT, 0 for other verdicts."""
    answer: str = ""
    """Final answer that was extracted from the response; empty where there is none, or extraction was not reached."""
    seconds: float = 0.0
    """Wall time of the verdict."""


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

    @property
    def credit(self) -> float:
        """Share of the reward of a CORRECT response, in [0, 1]."""
        return float(self.is_correct) if self.grade.credit is None else self.grade.credit

    def to_json(self) -> dict[str, Any]:
        """Returns a record for `files.json_line`. It has `inserted_spans` where there are any."""
        inserted = {"inserted_spans": self.rollout.inserted_spans} if self.rollout.inserted_spans else {}
        return {
            **{name: value for name, value in vars(self.rollout).items() if name != "inserted_spans"},
            **inserted,
            "prompt": dict(vars(self.rollout.prompt)),
            "weight_spans": [dict(vars(span)) for span in self.rollout.weight_spans],
            "grade": dict(vars(self.grade)),
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> GradedRollout:
        """Reads a record of `to_json`; further keys are ignored. Raises KeyError, TypeError or ValueError."""
        return cls(
            rollout=Rollout(
                prompt=Prompt(**record["prompt"]),
                sample_index=record["sample_index"],
                prompt_ids=tuple(record["prompt_ids"]),
                response_ids=np.asarray(record["response_ids"], np.int32),
                logprobs=np.asarray(record["logprobs"], np.float32),
                text=record["text"],
                finish_reason=FinishReason(record["finish_reason"]),
                weight_spans=tuple(WeightSpan(**span) for span in record["weight_spans"]),
                inserted_spans=tuple((start, end) for start, end in record.get("inserted_spans", ())),
            ),
            grade=Grade(**{**record["grade"], "verdict": Verdict(record["grade"]["verdict"])}),
        )


def positions_by(keys: Iterable[Hashable]) -> list[list[int]]:
    """Returns the positions of each key, in the order of the keys' first positions."""
    found: dict[Hashable, list[int]] = {}
    for position, key in enumerate(keys):
        found.setdefault(key, []).append(position)
    return list(found.values())


def decided(graded: Iterable[GradedRollout]) -> list[GradedRollout]:
    """Returns the rollouts whose verdict is not UNDECIDED, in order."""
    return [item for item in graded if item.verdict is not Verdict.UNDECIDED]


def undecided(graded: Iterable[GradedRollout]) -> list[GradedRollout]:
    """Returns the rollouts whose verdict is UNDECIDED, in order."""
    return [item for item in graded if item.verdict is Verdict.UNDECIDED]


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """A response selected for training."""

    rollout: Rollout
    correct: bool
    advantage: float
    """Advantage A of the response, shaped from the rewards of its whole group."""

    @property
    def id(self) -> str:
        return self.rollout.id


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """Report of a step."""

    step: int
    """Number of the step, from 0; step s is the s-th draw from the prompt stream."""
    skipped: str | None = None
    """Reason for which the step updated nothing, or None."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """`section/name` -> value; sections: rollout, reward, loss, policy, reward_model, data, publication."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Wall seconds by phase: generate, verify, score, reward_model, policy, publish, total."""
    peak_gib: Mapping[str, float] = field(default_factory=dict)
    """Peak of memory by phase, on the process with the largest: allocated on its GPU, or its resident set."""

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
    """Evaluation of the policy on every benchmark after `step` steps."""

    step: int
    metrics: Mapping[str, float]
    """`benchmark/name` -> value: greedy_pass@1, avg@k, pass@k and undecided_share in [0, 1], response_tokens, ..."""
    seconds: float
    """Wall seconds from its begin to its end."""
    ended_after: int | None = None
    """Finished steps at its end, where the run trained meanwhile (evaluation.servers); None where training waited."""
    waited_seconds: float | None = None
    """Seconds of these for which training waited; None where it waited for all of them."""

    def to_json(self) -> dict[str, Any]:
        """Returns the record of metrics.jsonl."""
        return {"kind": "evaluation", **{name: value for name, value in asdict(self).items() if value is not None}}


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A generated response, or the beginning of a response."""

    token_ids: tuple[int, ...]
    """Token ids, with the stop token if the response ends with it."""
    logprobs: tuple[float, ...]
    """Log softmax(logits / temperature) of each token in nats, before top-p; of plain logits at temperature 0. Inserted
    tokens have none."""
    finish_reason: FinishReason | None
    """Reason for which generation ended; None where it was broken off and can go on."""
    weight_spans: tuple[WeightSpan, ...]
    """Spans of tokens by the weights that generated them."""
    inserted_spans: tuple[tuple[int, int], ...] = ()
    """Spans (start, end) of tokens that the policy did not generate; see Rollout."""

    def to_json(self) -> dict[str, Any]:
        """Returns a record of a response without inserted tokens, which alone can be broken off and go on."""
        assert not self.inserted_spans
        kept = {name: value for name, value in vars(self).items() if name != "inserted_spans"}
        return {**kept, "weight_spans": [dict(vars(span)) for span in self.weight_spans]}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Completion:
        """Reads a record of `to_json`. Raises KeyError, TypeError or ValueError."""
        reason = record["finish_reason"]
        return cls(
            token_ids=tuple(record["token_ids"]),
            logprobs=tuple(record["logprobs"]),
            finish_reason=None if reason is None else FinishReason(reason),
            weight_spans=tuple(WeightSpan(**span) for span in record["weight_spans"]),
        )


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """Request for a response."""

    prompt_ids: tuple[int, ...]
    seed: int
    """Seed of the response's randomness, which does not depend on its batch."""
    max_new_tokens: int
    """Limit of the whole response, with the tokens of `partial`."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end the response, in addition to the policy's stop token."""
    question: str = ""
    """Question of the prompt, for a loop of several turns."""
    expected_tokens: float | None = None
    """Mean tokens of earlier responses to the prompt; None: not known. It decides when and where the response is
    generated, and nothing else."""
    label: str = ""
    """Batch, prompt and sample of the response, such as `step_000003 12#0`, for timelines."""
    partial: Completion | None = None
    """Beginning of the response from an earlier step, to go on from; a finished response is returned as it is."""
