"""The section `rollout`: where responses are generated, how they are drawn, and how long a step waits for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from oreal_megatron.config.fields import (
    AsPath,
    Function,
    FunctionConfig,
    NonNegative,
    NonNegativeFloat,
    Port,
    Positive,
    PositiveFloat,
    Section,
    Share,
    Strings,
    Text,
)

OPTIONS_SET_BY_RUN = {
    "model-path": "from the policy's configuration",
    "load-format": "because publications bring the weights",
    "custom-weight-loader": "because publications load and audit weights through it",
    "weight-version": "in every publication",
    "enable-memory-saver": "from rollout.sglang.placement",
    "base-gpu-id": "from rollout.sglang.placement",
    "host": "from rollout.sglang.host",
    "port": "from rollout.sglang.port",
    "device": "from rollout.sglang.device",
    "mem-fraction-static": "from rollout.sglang.memory_share",
    "tp": "from rollout.sglang.tensor",
    "tp-size": "from rollout.sglang.tensor",
    "tensor-parallel-size": "from rollout.sglang.tensor",
    **dict.fromkeys(
        ("nnodes", "node-rank", "dist-init-addr", "nccl-init-addr"),
        "for one node, because it starts each server on one; more devices serve as more servers",
    ),
    "dtype": "from rollout.sglang.dtype",
    "context-length": "from model.max_sequence_length",
    "max-running-requests": "from rollout.sglang.max_concurrency",
    "skip-tokenizer-init": "always, because requests and responses are token ids",
    "quantization": "from rollout.sglang.dtype, because SGLang loads no new weights into layers that it quantised",
}
"""Options of sglang.launch_server that a run sets itself -> from what. rollout.sglang.arguments may not name them."""

VERIFICATION_OPTIONS: Mapping[str, str | float | bool | None] = {
    "speculative-algorithm": None,
    "speculative-use-rejection-sampling": False,
    "speculative-accept-threshold-single": 1.0,
    "speculative-accept-threshold-acc": 1.0,
    "speculative-use-block-verification": False,
    "enable-multi-layer-eagle": False,
}
"""Options of sglang.launch_server that say how drafts are made and verified -> their value where they are not given."""


class SamplingConfig(Section):
    """Sampling of responses."""

    temperature: NonNegativeFloat
    """Sampling temperature. 0: greedy."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)]
    """Probability mass of the nucleus that tokens are drawn from. 1: all tokens."""
    max_new_tokens: Positive
    """Longest response, in tokens."""


class RolloutSamplingConfig(SamplingConfig):
    """Sampling of responses that train, which a function of one's own may limit response by response."""

    function: Function | None = None
    """Function of one's own that returns limits of one response, within those of this section; docs/extending.md has
    its arguments. null: none."""


def _kind_of_transport(value: Any) -> str:
    """Returns the tag of a transport. Text without a dot is a name, so that a mistyped one is refused as such."""
    return "NameConfig" if isinstance(value, str) and "." not in value else "FunctionConfig"


# Tags that end with Config are left out of keys in messages, as classes are.
TransportConfig = Annotated[
    Annotated[Literal["direct", "broadcast", "ipc", "disk"], Tag("NameConfig")]
    | Annotated[FunctionConfig, AsPath, Tag("FunctionConfig")],
    Discriminator(_kind_of_transport),
]


class SGLangConfig(Section):
    """SGLang servers that generate rollouts. null: none; needed by `backend: sglang`."""

    urls: Strings
    """URLs of running servers to attach to, `http://host:port`. Empty: launch the servers on this machine."""
    num_servers: Positive
    """Number of servers to launch."""
    tensor: Positive
    """Tensor-parallel ranks of each server."""
    placement: Literal["colocated", "disaggregated"]
    """Devices of the servers. colocated: the trainer's, in turns with it; disaggregated: their own."""
    memory_share: Annotated[float, Field(gt=0.0, lt=1.0)]
    """Share of a device's memory for served weights and KV cache together. On the trainer's GPUs it is a share of the
    memory of `resources.device`, elsewhere of the memory that is free when the server starts."""
    dtype: Literal["bfloat16", "fp8"] | None
    """Data type of the served weights. null: model.dtype; fp8: linear layers in e4m3 with one power of two for each
    block of 128 x 128, all else in bfloat16. Weights are converted when they are published, and audited as served."""
    device: Literal["cpu", "cuda"]
    """Kind of device of the servers. Launched servers on `cpu` use the SGLang that `make sglang-deps` installs."""
    python: Text | None = None
    """Python interpreter that runs launched servers, of an environment with SGLang. null: the trainer's."""
    host: Text
    """Address at which launched servers listen."""
    port: Port | None
    """Port of the first launched server; the others get the ports after it. null: free ports."""
    max_concurrency: Positive
    """Largest number of requests in flight at one server, over all data-parallel replicas, each of which may send at
    least one."""
    transport: TransportConfig
    """Way of new weights to the servers. direct: each server rank receives exactly its own bytes; broadcast: every
    server rank receives whole tensors, through SGLang's own endpoint; ipc: through memory of one machine; disk: through
    a Hugging Face directory on a shared file system, which the servers load; `module.name`: a class of one's own, see
    docs/extending.md."""
    bucket_mib: Positive
    """Size of the buckets in which weights move, in MiB. A process needs memory for two buckets, and for three where
    `ipc` or `broadcast` collect a bucket for other ranks, or where changes are found (full_every)."""
    full_every: Positive = 1
    """Publications of which one sends all weights with `transport: direct`; the others send those whose bits have
    changed since the last one, and each trainer rank keeps a copy of its weights to compare with. 1: always all."""
    weights_dir: Text | None
    """Directory that `transport: disk`, or one of one's own, writes the latest weights to. null: weights/ in run.dir.
    """
    startup_seconds: PositiveFloat
    """Seconds that a server may take to answer after its start or after lost contact, before it counts as failed."""
    health_seconds: PositiveFloat
    """Seconds without a sign of life after which a server with requests counts as lost. SGLang's own health check takes
    up to 20 seconds."""
    control_seconds: PositiveFloat
    """Seconds that one step of a publication (pause, load, flush) may take before the server counts as lost. Must be
    below parallel.timeout_seconds."""
    max_restarts: NonNegative
    """Number of restarts in a row of a launched server, after which it counts as failed."""
    arguments: Mapping[str, str | int | float | bool]
    """Further options of `sglang.launch_server`, by name without leading dashes. true: a flag without value."""

    @property
    def options(self) -> dict[str, str | int | float | bool]:
        """`arguments` by the names of SGLang's command line."""
        return {name.replace("_", "-"): value for name, value in self.arguments.items()}

    @property
    def total_servers(self) -> int:
        """Number of servers, launched or attached."""
        return len(self.urls) or self.num_servers

    @property
    def shares_devices(self) -> bool:
        return self.placement == "colocated"

    @property
    def shares_gpus(self) -> bool:
        return self.shares_devices and self.device == "cuda"


class MismatchConfig(Section):
    """Limits of the mean |log pi - log pi_rollout| of a step, in nats per token. null: only report it."""

    warn: PositiveFloat
    """Value above which the step logs a warning."""
    stop: PositiveFloat
    """Value above which the step does not train and the run ends."""


class UndecidedConfig(Section):
    """Limits of the share of UNDECIDED responses in a step, on a benchmark and in the estimation of pass rates.

    null: only report it.
    """

    warn: Share
    """Share above which a warning is logged."""
    stop: Share
    """Share above which the run ends. It continues with the responses that it has, and grades UNDECIDED ones again."""


class GenerationConfig(Section):
    """A loop of one's own that writes a response with the policy, in several turns. null: a response is one turn."""

    function: Function
    """Async function that writes a response; docs/extending.md has its arguments."""
    seconds: PositiveFloat = 60.0
    """Time for which loops may be busy between two requests for the policy's tokens; then the run ends."""


class LongTailConfig(Section):
    """Early stop of generation: a step asks for more prompts than it needs and goes on without the slowest responses.

    null: a step waits for all responses.
    """

    oversample: Annotated[float, Field(gt=1.0, allow_inf_nan=False)]
    """Prompts that a step asks for, as a multiple of data.prompts_per_step."""
    until: Literal["complete", "useful"]
    """Groups that count towards data.prompts_per_step. complete: groups with all responses; useful: complete groups
    that objective.keep_groups keeps. Prompts of unfinished groups come first in the next step."""
    carry_updates: NonNegative
    """Number of steps that update the policy for which tokens of an interrupted response are kept. The response
    continues from them, and each token keeps the log-probability that it was drawn with. 0: it is generated again after
    an update."""


class RolloutConfig(Section):
    """Generation of rollouts."""

    backend: Literal["embedded", "sglang"]
    """Place of generation. embedded: on the trainer's own model, in its processes; sglang: by servers."""
    schedule: Literal["in_turn", "one_ahead", "continuous"] = "in_turn"
    """Order of generation and training. in_turn: a step generates, then trains; one_ahead: while a step trains, the
    servers generate the next step's rollouts, which complete before new weights are published; continuous: the servers
    generate for the next max_staleness steps, and their responses go on under the new weights (in_flight)."""
    in_flight: Literal["recompute", "keep_cache"] = "recompute"
    """KV cache of responses that are under way at a publication of `schedule: continuous`. recompute: it is computed
    again, with the new weights; keep_cache: they go on with the cache of the weights that began them, by which their
    age is counted."""
    max_staleness: NonNegative | None = None
    """Largest number of policy updates between the oldest token of a trained response and the policy that it trains: 0
    for in_turn, 1 for one_ahead, any number above 0 for continuous. null: 0 for in_turn, 1 for one_ahead, 2 for
    continuous."""
    samples_per_prompt: Positive
    """Number K of responses for each prompt."""
    sampling: RolloutSamplingConfig
    """Sampling of responses."""
    batch_size: Positive
    """Number of sequences that the embedded backend generates at the same time. Pass rates are estimated in batches of
    this size too."""
    reward: Function | None = None
    """Function of one's own that rewards a response, in place of the verifier; docs/extending.md has its arguments.
    null: none."""
    generation: GenerationConfig | None = None
    """Loop of one's own that writes a response, such as with tools. null: a response is one turn of the policy."""
    mismatch: MismatchConfig | None = None
    """Limits of the difference between policy and rollouts. null: only report it."""
    undecided: UndecidedConfig | None = None
    """Limits of the share of responses without a verdict. null: only report it."""
    long_tail: LongTailConfig | None = None
    """Early stop of generation. Needs `backend: sglang`. null: a step waits for all responses."""
    sglang: SGLangConfig | None = None
    """Settings of the servers. Needed by `backend: sglang`; null for `backend: embedded`."""

    @property
    def staleness_bound(self) -> int:
        """max_staleness, or what the schedule needs."""
        if self.max_staleness is not None:
            return self.max_staleness
        return {"in_turn": 0, "one_ahead": 1, "continuous": 2}[self.schedule]
