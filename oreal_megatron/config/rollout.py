"""The section `rollout`: where responses are generated, how they are drawn, and how long a step waits for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from oreal_megatron.config.fields import NonNegative, NonNegativeFloat, Positive, PositiveFloat, Section, Strings


class SamplingConfig(Section):
    """How responses are drawn."""

    temperature: NonNegativeFloat
    """0: greedy."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)]
    max_new_tokens: Positive


class SGLangConfig(Section):
    """SGLang servers that generate rollouts: launched by the run on this machine, or attached to."""

    urls: Strings
    """Servers that run already, `http://host:port`; empty: launch them."""
    num_servers: Positive
    """Launched servers."""
    tensor: Positive
    """Tensor-parallel ranks of every server."""
    placement: Literal["colocated", "disaggregated"]
    """On the trainer's devices, in turns with it, or on devices of their own."""
    memory_share: Annotated[float, Field(gt=0.0, lt=1.0)]
    """Of a device's memory, for the served weights and the KV cache together."""
    dtype: Literal["bfloat16", "fp8"] | None
    """Of the served weights; null: model.dtype. fp8: linear layers in e4m3, a power of two a block of 128 x 128, the
    rest in bfloat16. Weights are cast when they are published, and audited as they are served."""
    device: Literal["cpu", "cuda"]
    """Of the servers; launched ones on `cpu` use the directory that `make sglang-deps` fills."""
    host: str
    """Address that launched servers listen at."""
    port: Annotated[int, Field(gt=0, le=65535)] | None
    """Port of the first launched server, the others follow; null: free ones."""
    max_concurrency: Positive
    """Requests in flight at one server; the next is sent as soon as one is answered."""
    transport: Literal["direct", "broadcast", "ipc", "disk"]
    """How new weights reach the servers; direct: each rank is sent exactly its own bytes; broadcast: whole tensors to
    every rank, in SGLang's own way; ipc: through memory of one machine; disk: a Hugging Face directory that they load,
    on a file system they share."""
    bucket_mib: Positive
    """Of the buckets in which weights move; beside its weights a process has less than two, one that `ipc` or
    `broadcast` collects for others up to three."""
    weights_dir: str | None
    """Where `disk` writes them, the latest version only; null: `weights` in run.dir."""
    startup_seconds: PositiveFloat
    """A server that does not answer so long after its start, or after contact was lost, is given up."""
    health_seconds: PositiveFloat
    """A server that gives no sign of life for so long while it has requests counts as lost; SGLang's own check takes
    up to 20 seconds."""
    control_seconds: PositiveFloat
    """Pausing, loading weights, flushing: a step of a publication that takes longer means that the server is lost."""
    max_restarts: NonNegative
    """In a row, of one launched server, before it is given up."""
    arguments: Mapping[str, str | int | float | bool]
    """More options of `sglang.launch_server`, by name without dashes in front; true: a flag."""

    @property
    def shares_devices(self) -> bool:
        return self.placement == "colocated"


class MismatchConfig(Section):
    """How far the policy's log-probabilities may be from the rollouts': a step's mean |difference|, in nats a token."""

    warn: PositiveFloat
    stop: PositiveFloat
    """A step beyond it is not trained on; the run ends."""


class LongTailConfig(Section):
    """A step asks for more prompts than it needs, and goes on without the slowest responses."""

    oversample: Annotated[float, Field(gt=1.0, allow_inf_nan=False)]
    """Prompts that a step asks for, as a multiple of data.prompts_per_step."""
    until: Literal["complete", "useful"]
    """The step has enough once data.prompts_per_step groups are complete; or complete and of use to the objective
    (objective.keep_groups). Prompts of the others come first in the next step."""
    carry_updates: NonNegative
    """Policy updates over which the tokens of a broken-off response are kept: it goes on from them, each token with
    the log-probability that it was drawn with. 0: after an update it is generated anew."""


class RolloutConfig(Section):
    """Where and how rollouts are generated."""

    backend: Literal["embedded", "sglang"]
    """embedded: on the trainer's own model, in its processes; sglang: by servers."""
    samples_per_prompt: Positive
    """K."""
    sampling: SamplingConfig
    batch_size: Positive
    """Sequences that one embedded batch generates at the same time; pass rates are estimated so many at a time."""
    mismatch: MismatchConfig | None = None
    """null: reported only."""
    long_tail: LongTailConfig | None = None
    """null: a step waits for all its responses. Needs `backend: sglang`."""
    sglang: SGLangConfig | None = None
    """Belongs to `backend: sglang`."""
