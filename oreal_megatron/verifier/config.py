"""The `verifier` section of the configuration. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


# YAML has lists, where the frozen and strict sections have tuples.
Strings = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]


class JudgeConfig(BaseModel):
    """The second stage: a model behind an OpenAI-compatible API decides whether two answers agree."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    mode: Literal["off", "undecided", "recheck_negatives"] = Field(
        default="off",
        description="off: rules only. undecided: the judge sees the answers that the rules could not decide. "
        "recheck_negatives: it also sees the answers that the rules call INCORRECT, as in the authors' release.",
    )
    endpoints: Strings = Field(
        default=(),
        description="Base URLs of the servers, such as http://node1:30000/v1; failing servers are left out.",
    )
    model: str = Field(default="", description="Model name that the servers expect in a request.")
    timeout_seconds: float = Field(default=60.0, gt=0, description="Time limit of one HTTP request.")
    max_concurrency: int = Field(
        default=32, ge=1, description="Largest number of requests in flight, over all endpoints."
    )
    max_attempts: int = Field(
        default=3,
        ge=1,
        description="Largest number of requests for one answer; it stays UNDECIDED if all of them fail.",
    )
    backoff_seconds: float = Field(
        default=0.5, ge=0, description="Pause before the first retry; it doubles with every further retry."
    )
    breaker_failures: int = Field(
        default=5,
        ge=1,
        description="Number of consecutive failures after which an endpoint is not used for breaker_seconds.",
    )
    breaker_seconds: float = Field(default=30.0, ge=0, description="Seconds for which a failing endpoint is not used.")
    enforce_json: bool = Field(
        default=True,
        description="Ask the server to constrain the reply to a JSON schema. Set it to false for servers without that "
        "feature; the reply must then be a single letter.",
    )
    max_answer_chars: int = Field(
        default=2_000,
        ge=1,
        description="Length of the longest final answer that the judge sees; a longer one keeps the rules' verdict.",
    )
    api_key_env: str | None = Field(
        default=None, description="Name of the environment variable that holds the bearer token; null sends no token."
    )

    @model_validator(mode="after")
    def _judge_has_a_server(self) -> Self:
        if self.mode != "off" and not (self.endpoints and self.model):
            raise ValueError(
                f"verifier.judge.mode is {self.mode!r} but endpoints is {list(self.endpoints)} and model is "
                f"{self.model!r}. Name at least one endpoint and the model, or set verifier.judge.mode=off."
            )
        return self


class VerifierConfig(BaseModel):
    """Settings of the grading of responses."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    num_workers: int = Field(
        default=4, ge=1, description="Processes that compare symbolic answers; started when the first one is needed."
    )
    timeout_seconds: float = Field(
        default=2.0,
        gt=0,
        description="Time limit of one comparison. Its process is killed then, and the answer is UNDECIDED.",
    )
    memory_limit_mb: int = Field(
        default=1024,
        ge=256,
        description="Limit of a worker's address space, in MiB. A comparison that exceeds it is UNDECIDED.",
    )
    thinking_end_marks: Strings = Field(
        default=("</think>", "**Final Answer**", "<conclude>"),
        description="Marks that end thinking. Only the text behind the last mark is graded; without marks, all.",
    )
    cache_path: str | None = Field(
        default=None,
        description="File of the verdict cache, which runs and processes may share; null disables the cache.",
    )
    judge: JudgeConfig = Field(default=JudgeConfig(), description="The model judge, which follows the rules.")
