"""What a verifier can be told: strict, frozen, without torch."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


class JudgeMode(StrEnum):
    """Which responses the model judge sees."""

    OFF = "off"
    UNDECIDED = "undecided"
    RECHECK_NEGATIVES = "recheck_negatives"


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _as_mode(value: Any) -> JudgeMode:
    if value not in tuple(JudgeMode):
        raise ValueError(f"set it to {', '.join(repr(str(mode)) for mode in JudgeMode)}")
    return JudgeMode(value)


# YAML has lists and strings, where the frozen and strict sections have tuples and modes.
Strings = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]
Mode = Annotated[JudgeMode, BeforeValidator(_as_mode)]


class JudgeConfig(BaseModel):
    """The second stage: a model behind an OpenAI-compatible API says whether two answers agree."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    mode: Mode = Field(
        default=JudgeMode.OFF,
        description="off: rules only. undecided: what the rules could not decide. "
        "recheck_negatives: also what the rules' comparison called INCORRECT, as in the authors' release.",
    )
    endpoints: Strings = Field(
        default=(),
        description="Base URLs of the servers, such as http://node1:30000/v1; used in turn, the broken ones left out.",
    )
    model: str = Field(default="", description="Model name that the servers expect in a request.")
    timeout_seconds: float = Field(default=60.0, gt=0, description="Limit of one HTTP request.")
    max_concurrency: int = Field(default=32, ge=1, description="Requests in flight at once, over all endpoints.")
    max_attempts: int = Field(default=3, ge=1, description="Requests for one question before it stays UNDECIDED.")
    backoff_seconds: float = Field(
        default=0.5, ge=0, description="Pause before the first retry; doubles with every further one."
    )
    breaker_failures: int = Field(
        default=5, ge=1, description="Failures in a row after which an endpoint is left alone for a while."
    )
    breaker_seconds: float = Field(default=30.0, ge=0, description="How long a failing endpoint is left alone.")
    enforce_json: bool = Field(
        default=True,
        description="Ask the server to constrain the reply to a JSON schema. Off for servers without that feature: "
        "then the reply must be a single letter.",
    )
    max_answer_chars: int = Field(
        default=2_000,
        ge=1,
        description="A longer final answer is not sent to the judge and stays as the rules left it.",
    )
    api_key_env: str | None = Field(
        default=None, description="Name of the environment variable that holds the bearer token, or null for none."
    )

    @model_validator(mode="after")
    def _judge_has_a_server(self) -> Self:
        if self.mode is not JudgeMode.OFF and not (self.endpoints and self.model):
            raise ValueError(
                f"verifier.judge.mode is {self.mode.value!r} but endpoints is {list(self.endpoints)} and model is "
                f"{self.model!r}: name at least one endpoint and the model, or set mode to 'off'"
            )
        return self


class VerifierConfig(BaseModel):
    """How responses are graded."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    num_workers: int = Field(
        default=4, ge=1, description="Processes that compare symbolic answers; started when the first one is needed."
    )
    timeout_seconds: float = Field(
        default=2.0,
        gt=0,
        description="Limit of one comparison; then its process is killed and the answer is UNDECIDED.",
    )
    memory_limit_mb: int = Field(
        default=1024, ge=256, description="Address space of one worker process; beyond it the answer is UNDECIDED."
    )
    thinking_end_marks: Strings = Field(
        default=("</think>", "**Final Answer**", "<conclude>"),
        description="Only what follows the last of these counts; a response with none of them counts as a whole.",
    )
    cache_path: str | None = Field(
        default=None, description="File of the verdict cache, shared by runs and processes; null for none."
    )
    judge: JudgeConfig = Field(default=JudgeConfig(), description="The model judge behind the rules.")
