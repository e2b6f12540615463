"""The schema of a run: strict, frozen, without torch.

Hydra composes conf/ and overrides; `parse_config` validates the result once and reports every violation at
once, each with its key, its value and what would be right. Nothing below reads a DictConfig.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import ceil
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from oreal_megatron.gpu.recipes import CAPABILITIES, RecipeName, device_problem, recipes_for
from oreal_megatron.verifier.config import VerifierConfig

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


Strings = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]
FloatPair = Annotated[tuple[float, float], BeforeValidator(_as_tuple)]


class Section(BaseModel):
    """A part of the configuration: no unknown keys, no coercion, immutable."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class GeometryConfig(Section):
    """Shape of a decoder-only transformer (RMSNorm, SwiGLU, RoPE, grouped-query attention)."""

    num_layers: Positive
    hidden_size: Positive
    ffn_hidden_size: Positive
    num_attention_heads: Positive
    num_query_groups: Positive
    head_dim: Positive | None = None
    """None: hidden_size / num_attention_heads."""
    vocab_size: Positive | None = None
    """Rows of the embedding before padding; None: as many as the tokenizer has."""
    rope_theta: PositiveFloat = 10000.0
    rope_scaling_factor: PositiveFloat | None = None
    """Factor of Llama 3.1's scaling of the rotary embedding; null: none."""
    norm_eps: PositiveFloat = 1e-6
    qkv_bias: bool = True
    qk_norm: bool = False
    """RMSNorm on the queries and keys of each head, as in Qwen3."""
    tied_embeddings: bool = False
    init_std: PositiveFloat = 0.02


class ModelConfig(Section):
    """Where policy, reference and reward model come from."""

    path: str | None
    """A Hugging Face model directory (config.json, tokenizer, safetensors), or null to start from random weights."""
    geometry: GeometryConfig | None
    """Shape of a model that starts from random weights; with `path`, what its config.json must agree with, or null."""
    tokenizer: str
    """`arithmetic` for the built-in one, or a Hugging Face directory."""
    implementation: Literal["local", "transformer_engine"]
    """Megatron-Core's own layers, or Transformer Engine's, which need CUDA."""
    dtype: Literal["float32", "bfloat16"]
    """Of weights and compute; bfloat16 keeps fp32 master weights, gradients and optimizer states."""
    max_sequence_length: Positive
    """Prompt and response together, in tokens."""
    reward_model: str | None = None
    """Whose reward model this run's starts from: a checkpoint directory of another run (its weights only); null: the
    initial policy with a scalar head of zeros."""
    logprob_chunk_tokens: Positive = 1024
    """Positions whose logits exist at the same time."""


class Fp8ModelConfig(Section):
    """FP8 matrix products in one model's layers; embedding, output layer, attention and norms stay in model.dtype."""

    recipe: RecipeName
    """What shares a scale, and where it comes from: delayed (a tensor; earlier passes), tensorwise (a tensor; itself),
    blockwise (1 x 128 or 128 x 128), mxfp8 (1 x 32, powers of two)."""
    format: Literal["e4m3", "hybrid"]
    """Of gradients; weights and activations are e4m3. hybrid: e5m2."""
    bf16_first_layers: NonNegative
    """Layers at the start that stay in bf16."""
    bf16_last_layers: NonNegative
    """Layers at the end that stay in bf16."""
    amax_history: Positive | None
    """Passes whose largest value makes a scale, of `delayed`; null: of the others."""
    parameters: bool
    """Weights are kept in FP8, and gathered so by the distributed optimizer; fp32 master weights stay."""


class Fp8Config(Section):
    """Which models compute in FP8; null: none in this model. The warm start always runs in model.dtype."""

    policy: Fp8ModelConfig | None
    reward_model: Fp8ModelConfig | None
    reference: Fp8ModelConfig | None

    @property
    def models(self) -> dict[str, Fp8ModelConfig]:
        """Those in FP8, by name."""
        named = {"policy": self.policy, "reward_model": self.reward_model, "reference": self.reference}
        return {name: model for name, model in named.items() if model is not None}


class PromptConfig(Section):
    """How a question becomes the token ids of a prompt."""

    system: str | None
    user: str
    """The user's message; `{question}` is replaced."""
    stop_token: str
    thinking_end_marks: Strings
    """What follows the last of these marks is the final answer."""
    max_prompt_tokens: Positive


class ArithmeticConfig(Section):
    """Generated arithmetic problems with worked solutions."""

    num_train: Positive
    num_heldout: Positive
    num_demonstrations: Positive
    """Solutions for the warm start; drawn apart from the other two sets."""
    direct_shares: Annotated[tuple[Share, Share], BeforeValidator(_as_tuple)]
    """Share of the demonstrations that state the answer without working, which a small model rarely gets right: of
    those with min_terms, and of those with max_terms; between them on a line."""
    min_terms: Annotated[int, Field(ge=2, le=6)]
    max_terms: Annotated[int, Field(ge=2, le=6)]
    max_operand: Annotated[int, Field(ge=2, le=999)]
    max_factor: Annotated[int, Field(ge=2, le=99)]
    """Largest operand of a multiplication."""
    operators: Annotated[tuple[Literal["+", "-", "*"], ...], BeforeValidator(_as_tuple), Field(min_length=1)]


class PassRateConfig(Section):
    """Estimation of each prompt's pass rate with the initial policy, where the data lack it."""

    samples: Positive
    max_prompts: Positive | None
    """Estimate (and keep) no more than these, drawn by the run's seed; null: all."""


class BalanceBin(Section):
    """Prompts with low <= pass_rate < high occur `repeat` times an epoch."""

    low: Share
    high: Annotated[float, Field(ge=0.0)]
    repeat: NonNegative


class DataConfig(Section):
    """The prompt stream."""

    train: str | None
    """JSONL with question, gold_answer and, optionally, pass_rate and id; null: generated arithmetic."""
    arithmetic: ArithmeticConfig | None
    """What is generated: the prompts where `train` is null, held-out problems and demonstrations where no file is
    named for these."""
    prompts_per_step: Positive
    pass_rate: PassRateConfig | None
    difficulty_balance: Annotated[tuple[BalanceBin, ...], BeforeValidator(_as_tuple)]
    """Empty: every prompt once an epoch, whatever its pass rate."""


class TokenWeightConfig(Section):
    """Token weights from the reward model's scores, eq. (10) and its variants."""

    source: Literal["reward_model", "ones"]
    alignment: Literal["predictor", "inclusive"]
    """Which position's score stands for token t: the one that predicts it, or its own."""
    positive_threshold: Annotated[float, Field(ge=0.0, lt=1.0)]
    negative_threshold: Annotated[float, Field(ge=0.0, lt=1.0)]
    top_share: Annotated[float, Field(gt=0.0, le=1.0)] | None
    """Keep this share of each response's positions, min-max rescaled; null: the threshold form."""


class ObjectiveConfig(Section):
    """What is optimised; presets in conf/objective."""

    preset: str
    """Name, for people and reports."""
    reward_values: FloatPair
    """Reward of an incorrect and of a correct response."""
    shaping: Literal["rloo", "grpo", "paper", "raw", "positive_one", "negative_one"]
    grpo_epsilon: NonNegativeFloat
    keep_groups: Literal["mixed", "all", "any_correct", "any_incorrect"]
    selection: Literal["pair", "all", "correct", "incorrect"]
    token_weights: TokenWeightConfig
    positive_term: Literal["logprob", "ratio"]
    negative_term: Literal["logprob", "ratio"]
    ratio_reference: Literal["self", "rollout"]
    """What a ratio divides by: the policy itself (value 1, gradient of log pi), or the rollout's log-probabilities."""
    clip: Annotated[float, Field(gt=0.0, lt=1.0)] | None
    """PPO clip range of the ratio; needs `ratio_reference: rollout`."""
    importance_limit: PositiveFloat | None
    """Weigh the policy terms token by token with pi / pi_rollout, pi the policy as it is when the step's training
    starts, truncated here; null: do not. Needs `ratio_reference: self`, since the other has this ratio already."""
    denominators: Literal["by_outcome", "all_trained"]
    """Tokens that the policy terms are divided by: of the same outcome (eq. 11), or of all that is trained."""
    eta: NonNegativeFloat
    """Weight of the negative term."""
    kl_type: Literal["k3", "k1", "mse"]
    beta: NonNegativeFloat
    kl_on_correct: bool
    actor_freeze_steps: NonNegative
    """Steps with a usable group during which only the reward model learns."""
    undecided_as_incorrect: bool
    pair_choice: Literal["seeded", "global_rng"]
    sampler: Literal["exact", "release"]
    policy_schedule: Literal["from_first_update", "from_first_step"]

    @property
    def uses_reward_model(self) -> bool:
        return self.token_weights.source == "reward_model"


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
    """On the trainer's devices, in turns with it (planned for, not built), or on devices of their own."""
    memory_share: Annotated[float, Field(gt=0.0, lt=1.0)]
    """Of a device's memory, for the served weights and the KV cache together."""
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
    """Of the buckets in which weights move; a process has two beside its weights."""
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


class AdamWConfig(Section):
    """AdamW, gradient clipping and a warm-up-cosine schedule for one model."""

    lr: PositiveFloat
    min_lr: NonNegativeFloat
    warmup_steps: NonNegative
    decay_steps: Positive | None
    """Updates after which lr has reached min_lr; null: as many as the run has."""
    weight_decay: NonNegativeFloat
    betas: FloatPair
    eps: PositiveFloat
    clip_grad: PositiveFloat


class OptimizerConfig(Section):
    policy: AdamWConfig
    reward_model: AdamWConfig


class ParallelConfig(Section):
    """How models are split; data parallelism takes the processes that are left."""

    tensor: Positive
    """Ranks that share every matrix."""
    pipeline: Positive
    """Stages, each a run of layers."""
    virtual_pipeline: Positive = 1
    """Runs of layers that a stage holds under the interleaved schedule; 1: plain 1F1B."""
    context: Positive = 1
    """Ranks that share every sequence."""
    sequence: bool = False
    """Sequence parallelism: norms and residuals split over the tensor ranks by tokens."""
    micro_batch_tokens: Positive
    """Packed tokens of a micro-batch; a longer sequence gets one of its own."""
    distributed_optimizer: bool = False
    """Optimizer states and fp32 weights split over data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Reduce gradients bucket by bucket behind the last backward pass."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations computed again in the backward pass: none, those of MLP and unfused attention, or whole layers."""
    fused_weight_gradients: bool = False
    """Matrix products add weight gradients to the fp32 buffer themselves; needs NVIDIA's apex."""
    offload: bool = False
    """Weights, gradients and optimizer states are on the device in the phases that use them, in host memory else."""
    timeout_seconds: Positive = 600
    """A collective that waits longer than this ends the job."""


class ResourcesConfig(Section):
    """What a run is meant for: `oreal-plan` and `oreal-submit` count on it, and the trainer checks its processes."""

    device: Literal["cpu", "a100_80gb", "h100_80gb"]
    devices_per_node: Positive
    trainer_devices: Positive | None
    """One trainer process each; servers on devices of their own come on top. null: as many as are started."""


class SftConfig(Section):
    """Supervised warm start on worked solutions, before the first step."""

    steps: Positive
    batch_size: Positive
    """Demonstrations an update."""
    demonstrations: str | None
    """JSONL with question and response; null: those of the generated arithmetic."""
    optimizer: AdamWConfig


class BenchmarkConfig(Section):
    """One evaluation set."""

    path: str | None
    """JSONL with question and gold_answer; null: the held-out generated problems."""
    samples: NonNegative
    """k of avg@k and pass@k, beside greedy pass@1; 0: greedy only."""
    limit: Positive | None
    """Only the first so many problems."""


class EvaluationConfig(Section):
    benchmarks: Mapping[str, BenchmarkConfig]
    every: NonNegative
    """Steps between evaluations; before the first and after the last step always; 0: only these."""
    sampling: SamplingConfig
    """For the samples of avg@k; greedy shares its token limit."""


class TrackingConfig(Section):
    console: Literal["rich", "plain", "quiet"]
    tensorboard: bool
    wandb: Literal["disabled", "offline", "online"]
    wandb_project: str
    trajectories: bool
    """Write every step's graded rollouts to trajectories/."""
    report: bool
    """Write report.html at the end."""


class RunConfig(Section):
    """One run."""

    name: str
    """Of the run in wandb and in the report."""
    dir: str
    """Everything that the run writes; the same directory resumes."""
    seed: NonNegative
    """Every source of randomness derives its own seed from this one."""
    num_steps: NonNegative
    mode: Literal["train", "rollout", "replay"]
    """train: the whole loop; rollout: generate, verify and save only; replay: train from saved trajectories."""
    replay_dir: str | None
    """A run's trajectories/ directory, for mode=replay."""
    checkpoint_every: NonNegative
    """0: only at the end."""
    keep_checkpoints: Positive
    """The newest so many; the best one by evaluation is kept besides."""
    export: Literal["none", "best", "every"]
    """Checkpoints to have in huggingface/, for transformers and servers: the best one by evaluation (the newest where
    nothing is evaluated), or every one that is kept."""
    async_checkpoints: bool
    """Write checkpoints behind the next steps, from a copy of the state; the last one is always waited for."""
    threads: Positive | None
    """CPU threads of a process; null: torch's choice."""
    dry_run: bool = False
    """Two steps of this experiment with everything small: model, lengths, data, layout (launch/dry_run.py says how)."""


class TrainConfig(Section):
    """One run."""

    run: RunConfig
    model: ModelConfig
    fp8: Fp8Config
    data: DataConfig
    prompt: PromptConfig
    objective: ObjectiveConfig
    rollout: RolloutConfig
    verifier: VerifierConfig
    optimizer: OptimizerConfig
    parallel: ParallelConfig
    resources: ResourcesConfig
    sft: SftConfig | None
    evaluation: EvaluationConfig
    tracking: TrackingConfig

    @property
    def num_asked_prompts(self) -> int:
        """Prompts that a step asks for."""
        tail = self.rollout.long_tail
        return self.data.prompts_per_step if tail is None else ceil(self.data.prompts_per_step * tail.oversample)


@dataclass(frozen=True)
class Violation:
    """One thing that is wrong: where, what was given, what would be right."""

    key: str
    value: Any
    remedy: str

    def __str__(self) -> str:
        shown = repr(self.value)
        return f"{self.key} = {shown if len(shown) <= 80 else shown[:77] + '...'}: {self.remedy}"


class ConfigError(ValueError):
    """The configuration is wrong; the message lists every violation."""

    def __init__(self, violations: list[Violation]):
        self.violations = violations
        lines = "\n".join(f"  {violation}" for violation in violations)
        super().__init__(f"{len(violations)} problem(s) in the configuration:\n{lines}")

    def __reduce__(self) -> tuple[type[ConfigError], tuple[list[Violation]]]:
        return ConfigError, (self.violations,)  # from one process to another


def parse_config(raw: Mapping[str, Any]) -> TrainConfig:
    """Validates a composed configuration.

    Raises:
        ConfigError: with all violations at once: of every section's schema, and of the checks across
            sections wherever the sections that they read are sound.
    """
    violations: list[Violation] = []
    sections: dict[str, Any] = {}
    for name, info in TrainConfig.model_fields.items():
        if name not in raw:
            violations.append(Violation(name, None, "section is missing"))
            continue
        try:
            adapter: TypeAdapter[Any] = TypeAdapter(info.annotation)  # type: ignore[arg-type]
            sections[name] = adapter.validate_python(raw[name])
        except ValidationError as error:
            violations += [_from_pydantic(name, raw[name], info.annotation, item) for item in error.errors()]
    for name in raw.keys() - TrainConfig.model_fields.keys():
        violations.append(Violation(name, raw[name], _unknown_key(name, TrainConfig.model_fields)))
    for check in _CHECKS:
        if all(name in sections for name in check.reads):
            violations += check.run(*(sections[name] for name in check.reads))
    if violations:
        raise ConfigError(violations)
    return TrainConfig(**sections)


def not_built(config: TrainConfig) -> list[Violation]:
    """What a plan may hold and a run may not: refused when a run starts, and before it is submitted."""
    servers = config.rollout.sglang
    if servers is None or servers.placement != "colocated" or servers.device != "cuda":
        return []
    remedy = "the trainer cannot share its devices with servers yet: disaggregated; oreal-plan plans both"
    return [Violation("rollout.sglang.placement", servers.placement, remedy)]


# What may change when a run goes on in its directory: how far, how fast and how visibly, not what it computes.
_MAY_CHANGE = (
    "run.dir",  # a directory may move
    "run.num_steps",
    "run.checkpoint_every",
    "run.keep_checkpoints",
    "run.export",
    "run.async_checkpoints",
    "run.threads",
    "tracking.",
    "parallel.",
    "rollout.sglang.",
    "resources.",
)


def check_resume(saved: Mapping[str, Any], config: TrainConfig, directory: str) -> None:
    """Refuses to go on in a directory whose run was configured otherwise.

    saved: the directory's config.yaml as plain data.

    Raises:
        ConfigError: with every key that differs and may not.
    """
    before, now = _flat(saved), _flat(config.model_dump(mode="json"))
    violations = [
        Violation(
            key, now.get(key), f"was {before.get(key)!r} in {directory}; resume with that, or use another run.dir"
        )
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not key.startswith(_MAY_CHANGE)
    ]
    if violations:
        raise ConfigError(violations)


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping) or not value:
        return {path: value}
    return {
        key: item
        for name, inner in value.items()
        for key, item in _flat(inner, f"{path}.{name}" if path else str(name)).items()
    }


def _from_pydantic(section: str, raw: Any, annotation: Any, error: Any) -> Violation:
    path = [part for part in error["loc"] if not (isinstance(part, str) and part.endswith("Config"))]
    key = ".".join([section, *map(str, path)])
    value = None if error["type"] == "missing" else error["input"]
    if error["type"] == "extra_forbidden":
        return Violation(key, value, _unknown_key(str(path[-1]), _fields_at(annotation, path[:-1])))
    if error["type"] == "missing":
        return Violation(key, value, "is required; set it (null where it does not apply)")
    return Violation(key, value, error["msg"][0].lower() + error["msg"][1:])


def _fields_at(annotation: Any, path: list[Any]) -> Mapping[str, Any]:
    """The fields of the section that `path` leads to, for a suggestion; empty where it can't be told."""
    candidates = [annotation, *getattr(annotation, "__args__", ())]
    model = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
    if model is None:
        return {}
    if not path:
        return model.model_fields
    info = model.model_fields.get(str(path[0]))
    return _fields_at(info.annotation, path[1:]) if info else {}


def _unknown_key(name: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    suggestion = f"; did you mean `{close[0]}`?" if close else f"; known keys: {', '.join(known)}" if known else ""
    return f"unknown key{suggestion}"


@dataclass(frozen=True)
class _Check:
    reads: tuple[str, ...]
    run: Callable[..., Iterator[Violation]]


_CHECKS: list[_Check] = []


def _check(*reads: str) -> Callable[[Callable[..., Iterator[Violation]]], Callable[..., Iterator[Violation]]]:
    def register(run: Callable[..., Iterator[Violation]]) -> Callable[..., Iterator[Violation]]:
        _CHECKS.append(_Check(reads, run))
        return run

    return register


@_check("model")
def _check_model(model: ModelConfig) -> Iterator[Violation]:
    if model.path is None and model.geometry is None:
        yield Violation(
            "model.path", None, "give model.path (a Hugging Face directory), or model.geometry to start anew"
        )
    if (g := model.geometry) is None:
        return
    if g.head_dim is None and g.hidden_size % g.num_attention_heads:
        yield Violation(
            "model.geometry.num_attention_heads",
            g.num_attention_heads,
            f"must divide model.geometry.hidden_size = {g.hidden_size}, or set model.geometry.head_dim",
        )
    if g.num_attention_heads % g.num_query_groups:
        yield Violation(
            "model.geometry.num_query_groups",
            g.num_query_groups,
            f"must divide model.geometry.num_attention_heads = {g.num_attention_heads}",
        )


@_check("model", "parallel")
def _check_layout(model: ModelConfig, parallel: ParallelConfig) -> Iterator[Violation]:
    if model.geometry is not None:
        yield from _layout_violations(model.geometry, parallel)


def check_layout(geometry: GeometryConfig, parallel: ParallelConfig) -> None:
    """For a geometry that a model directory brought. Raises ConfigError where the layout does not divide it."""
    if violations := list(_layout_violations(geometry, parallel)):
        raise ConfigError(violations)


def _layout_violations(g: GeometryConfig, parallel: ParallelConfig) -> Iterator[Violation]:
    for key, size, split, by in (
        ("parallel.tensor", g.num_attention_heads, parallel.tensor, "attention heads"),
        ("parallel.tensor", g.ffn_hidden_size, parallel.tensor, "columns of ffn_hidden_size"),
        ("parallel.pipeline", g.num_layers, parallel.pipeline, "layers"),
    ):
        if size % split:
            yield Violation(key, split, f"{size} {by} do not split evenly over {split} ranks")
    apart = g.num_query_groups % parallel.tensor and parallel.tensor % g.num_query_groups
    if apart and g.num_attention_heads % parallel.tensor == 0:
        yield Violation(
            "parallel.tensor",
            parallel.tensor,
            f"must divide model.geometry.num_query_groups = {g.num_query_groups} or be a multiple of it",
        )
    runs = parallel.pipeline * parallel.virtual_pipeline
    if parallel.virtual_pipeline > 1 and g.num_layers % runs:
        yield Violation(
            "parallel.virtual_pipeline",
            parallel.virtual_pipeline,
            f"{g.num_layers} layers do not split evenly into {parallel.pipeline} stages x "
            f"{parallel.virtual_pipeline} runs = {runs}",
        )


@_check("parallel")
def _check_parallel(parallel: ParallelConfig) -> Iterator[Violation]:
    if parallel.sequence and parallel.tensor == 1:
        # Megatron-Core turns it off layer by layer, and goes on.
        yield Violation("parallel.sequence", True, "splits tokens over the tensor ranks: needs parallel.tensor > 1")
    if parallel.virtual_pipeline > 1 and parallel.pipeline == 1:
        yield Violation(
            "parallel.virtual_pipeline", parallel.virtual_pipeline, "interleaves stages: needs parallel.pipeline > 1"
        )


@_check("fp8", "model", "parallel", "resources")
def _check_fp8(
    fp8: Fp8Config, model: ModelConfig, parallel: ParallelConfig, resources: ResourcesConfig
) -> Iterator[Violation]:
    for name, one in fp8.models.items():
        yield from _fp8_violations(f"fp8.{name}", one, is_trained=name != "reference", parallel=parallel)
        capability = CAPABILITIES.get(resources.device)
        if capability is not None and (problem := device_problem(one.recipe, capability)):
            can = ", ".join(recipes_for(capability)) or "none: fp8=none"
            yield Violation(f"fp8.{name}.recipe", one.recipe, f"{problem} (resources.device); it has {can}")
    if fp8.models and model.implementation == "local":
        # Megatron-Core itself ignores FP8 there, without a word.
        remedy = "has no FP8, which is Transformer Engine's: transformer_engine, or fp8=none"
        yield Violation("model.implementation", model.implementation, remedy)
    if fp8.models and model.dtype != "bfloat16":
        yield Violation("model.dtype", model.dtype, "what FP8 leaves is computed in bfloat16: use it, or fp8=none")


def _fp8_violations(
    key: str, fp8: Fp8ModelConfig, *, is_trained: bool, parallel: ParallelConfig
) -> Iterator[Violation]:
    if fp8.recipe == "delayed" and not is_trained:
        remedy = "a model that is never trained gets no scales from earlier passes: use tensorwise"
        yield Violation(f"{key}.recipe", fp8.recipe, remedy)
    if (fp8.recipe == "delayed") != (fp8.amax_history is not None):
        yield Violation(f"{key}.amax_history", fp8.amax_history, "belongs to recipe `delayed`, which needs it")
    for end in ("first", "last"):
        name = f"bf16_{end}_layers"
        if (num_layers := getattr(fp8, name)) and fp8.recipe == "delayed":
            # Its scales are updated when the pass leaves FP8: once a pass, not once a layer.
            yield Violation(f"{key}.{name}", num_layers, "`delayed` takes all layers or none: 0, or another recipe")
    if not fp8.parameters:
        return
    if fp8.recipe == "mxfp8":
        remedy = "mxfp8 weights live in the gradient buffer between steps, which is freed there: false"
        yield Violation(f"{key}.parameters", True, remedy)
    if is_trained and not parallel.distributed_optimizer:
        remedy = "only parallel.distributed_optimizer=true casts master weights to FP8: set it, or false"
        yield Violation(f"{key}.parameters", True, remedy)
    if parallel.offload:
        yield Violation(f"{key}.parameters", True, "FP8 weights cannot be parked: false, or parallel.offload=false")


@_check("model", "prompt", "rollout")
def _check_lengths(model: ModelConfig, prompt: PromptConfig, rollout: RolloutConfig) -> Iterator[Violation]:
    room = model.max_sequence_length - prompt.max_prompt_tokens
    if rollout.sampling.max_new_tokens > room:
        yield Violation(
            "rollout.sampling.max_new_tokens",
            rollout.sampling.max_new_tokens,
            f"at most {room} fit: model.max_sequence_length {model.max_sequence_length} less prompt.max_prompt_tokens "
            f"{prompt.max_prompt_tokens}",
        )


@_check("prompt")
def _check_prompt(prompt: PromptConfig) -> Iterator[Violation]:
    if "{question}" not in prompt.user:
        yield Violation("prompt.user", prompt.user, "must contain {question}")


@_check("data")
def _check_data(data: DataConfig) -> Iterator[Violation]:
    if data.train is None and data.arithmetic is None:
        yield Violation("data.train", None, "name a JSONL file, or use data=arithmetic")
    if (a := data.arithmetic) is not None and a.min_terms > a.max_terms:
        yield Violation("data.arithmetic.min_terms", a.min_terms, f"must not exceed max_terms = {a.max_terms}")
    for index, bin in enumerate(data.difficulty_balance):
        if bin.low >= bin.high:
            yield Violation(f"data.difficulty_balance.{index}.low", bin.low, f"must be below high = {bin.high}")


@_check("rollout", "model")
def _check_served_heads(rollout: RolloutConfig, model: ModelConfig) -> Iterator[Violation]:
    servers = rollout.sglang
    if servers is not None and model.geometry is not None:
        heads = model.geometry.num_attention_heads
        if heads % servers.tensor:
            yield Violation(
                "rollout.sglang.tensor",
                servers.tensor,
                f"{heads} attention heads do not split evenly over {servers.tensor} devices",
            )


@_check("rollout", "parallel", "resources")
def _check_resources(
    rollout: RolloutConfig, parallel: ParallelConfig, resources: ResourcesConfig
) -> Iterator[Violation]:
    trainers, servers = resources.trainer_devices, rollout.sglang
    if trainers is None:
        if servers is not None and servers.placement == "colocated":
            yield Violation("resources.trainer_devices", None, "say how many, where servers share the allocation")
        return
    replica = parallel.tensor * parallel.pipeline * parallel.context
    if trainers % replica:
        yield Violation(
            "resources.trainer_devices",
            trainers,
            f"is no multiple of a model replica's {replica} = parallel.tensor {parallel.tensor} x pipeline "
            f"{parallel.pipeline} x context {parallel.context}",
        )
    # CPU servers share cores with whatever runs there.
    shares = servers is not None and servers.placement == "colocated" and servers.device == "cuda"
    if servers is not None and shares and servers.num_servers * servers.tensor != trainers:
        yield Violation(
            "rollout.sglang.num_servers",
            servers.num_servers,
            f"{servers.num_servers} servers of {servers.tensor} devices are not the {trainers} trainer devices that "
            f"they share: {trainers // servers.tensor} are",
        )
    if parallel.tensor > resources.devices_per_node:
        yield Violation(
            "parallel.tensor",
            parallel.tensor,
            f"tensor ranks share every matrix and must not span nodes: at most {resources.devices_per_node}",
        )


@_check("data", "sft", "evaluation")
def _check_generated(data: DataConfig, sft: SftConfig | None, evaluation: EvaluationConfig) -> Iterator[Violation]:
    if data.arithmetic is not None:
        return
    if sft is not None and sft.demonstrations is None:
        yield Violation("sft.demonstrations", None, "name a JSONL file, or use data=arithmetic, or sft=none")
    for name, benchmark in evaluation.benchmarks.items():
        if benchmark.path is None:
            yield Violation(f"evaluation.benchmarks.{name}.path", None, "name a JSONL file, or use data=arithmetic")


@_check("model", "sft")
def _check_start(model: ModelConfig, sft: SftConfig | None) -> Iterator[Violation]:
    if model.path is None and sft is None:
        yield Violation("model.path", None, "a model from random weights has nothing to sample: add sft=... or a path")


@_check("evaluation")
def _check_evaluation(evaluation: EvaluationConfig) -> Iterator[Violation]:
    for name, benchmark in evaluation.benchmarks.items():
        if benchmark.samples and evaluation.sampling.temperature == 0:
            yield Violation(
                f"evaluation.benchmarks.{name}.samples",
                benchmark.samples,
                "samples are all alike at evaluation.sampling.temperature = 0; raise it, or set samples to 0",
            )


@_check("rollout")
def _check_servers(rollout: RolloutConfig) -> Iterator[Violation]:
    if (rollout.backend == "sglang") != (rollout.sglang is not None):
        yield Violation("rollout.backend", rollout.backend, "rollout.sglang belongs to sglang, which needs it")
    if rollout.long_tail is not None and rollout.backend == "embedded":
        yield Violation(
            "rollout.backend", "embedded", "a batch ends as a whole, nothing of it can be broken off: long_tail=null"
        )
    if (limits := rollout.mismatch) is not None:
        if limits.warn > limits.stop:
            yield Violation("rollout.mismatch.warn", limits.warn, f"must not exceed stop = {limits.stop}")
        if rollout.sampling.temperature != 1.0:
            yield Violation(
                "rollout.sampling.temperature",
                rollout.sampling.temperature,
                "rollouts have the policy's log-probabilities at 1.0 only; use it, or rollout.mismatch=null",
            )
    if (servers := rollout.sglang) is None:
        return
    for index, url in enumerate(servers.urls):
        if not url.startswith(("http://", "https://")) or url.endswith("/"):
            yield Violation(f"rollout.sglang.urls.{index}", url, "must look like http://host:port")
    if len(set(servers.urls)) < len(servers.urls):
        yield Violation("rollout.sglang.urls", servers.urls, "names a server twice")
    if servers.port is not None and not servers.urls and servers.port + servers.num_servers - 1 > 65535:
        yield Violation("rollout.sglang.port", servers.port, f"leaves no room for {servers.num_servers} servers")
    elsewhere = [url for url in servers.urls if urlsplit(url).hostname not in ("127.0.0.1", "localhost", "::1")]
    if servers.transport == "ipc" and elsewhere:
        remedy = f"shares memory of one machine, and {elsewhere[0]} is on another: use direct"
        yield Violation("rollout.sglang.transport", servers.transport, remedy)
    for name in servers.arguments:
        if (own := _OWN_ARGUMENTS.get(name.replace("_", "-"))) is not None:
            yield Violation(f"rollout.sglang.arguments.{name}", servers.arguments[name], own)


@_check("rollout", "parallel")
def _check_patience(rollout: RolloutConfig, parallel: ParallelConfig) -> Iterator[Violation]:
    servers = rollout.sglang
    if servers is not None and servers.control_seconds >= parallel.timeout_seconds:
        yield Violation(
            "rollout.sglang.control_seconds",
            servers.control_seconds,
            f"the trainer's ranks wait for servers in a publication: stay below parallel.timeout_seconds = "
            f"{parallel.timeout_seconds}",
        )


# Options of sglang.launch_server that the run sets, and from what.
_OWN_ARGUMENTS = {
    "model-path": "is made from the policy's configuration",
    "load-format": "is set: publications bring the weights",
    "custom-weight-loader": "is set: publications are audited through it",
    "weight-version": "is set by publications",
    "host": "is rollout.sglang.host",
    "port": "is rollout.sglang.port",
    "device": "is rollout.sglang.device",
    "mem-fraction-static": "is rollout.sglang.memory_share",
    "tp": "is rollout.sglang.tensor",
    "tp-size": "is rollout.sglang.tensor",
    "tensor-parallel-size": "is rollout.sglang.tensor",
    "dtype": "is model.dtype",
    "context-length": "is model.max_sequence_length",
    "max-running-requests": "is rollout.sglang.max_concurrency",
    "skip-tokenizer-init": "is always set: token ids go in and out",
    "quantization": "cannot be: SGLang 0.5.23 loads no new weights into layers that it has quantised itself",
}


@_check("objective", "rollout")
def _check_objective(objective: ObjectiveConfig, rollout: RolloutConfig) -> Iterator[Violation]:
    o = objective
    if o.reward_values[0] >= o.reward_values[1]:
        yield Violation("objective.reward_values", o.reward_values, "must rise: [incorrect, correct]")
    if o.clip is not None and (o.ratio_reference != "rollout" or "logprob" in (o.positive_term, o.negative_term)):
        yield Violation("objective.clip", o.clip, "needs both terms to be `ratio` and ratio_reference to be `rollout`")
    if o.importance_limit is not None and o.ratio_reference != "self":
        yield Violation("objective.importance_limit", o.importance_limit, "needs ratio_reference to be `self`")
    by_rollout = o.ratio_reference == "rollout" or o.importance_limit is not None
    if by_rollout and rollout.sampling.temperature != 1.0:
        yield Violation(
            "rollout.sampling.temperature",
            rollout.sampling.temperature,
            f"objective {o.preset} divides by the rollout's probabilities, which are the policy's at 1.0 only",
        )
    if o.selection == "pair" and o.keep_groups != "mixed":
        yield Violation("objective.selection", o.selection, "a pair exists in mixed groups only: keep_groups=mixed")
    if o.actor_freeze_steps and not o.uses_reward_model:
        yield Violation("objective.actor_freeze_steps", o.actor_freeze_steps, "must be 0 without a reward model")
    needs_group = o.keep_groups == "mixed" or o.shaping in ("rloo", "grpo")
    if needs_group and rollout.samples_per_prompt < 2:
        yield Violation(
            "rollout.samples_per_prompt",
            rollout.samples_per_prompt,
            f"objective {o.preset} compares the responses of a group: at least 2",
        )
    if rollout.sampling.temperature == 0 and needs_group:
        yield Violation("rollout.sampling.temperature", 0.0, "greedy samples of one prompt are all alike; raise it")


@_check("optimizer", "sft")
def _check_schedules(optimizer: OptimizerConfig, sft: SftConfig | None) -> Iterator[Violation]:
    schedules = {"optimizer.policy": optimizer.policy, "optimizer.reward_model": optimizer.reward_model}
    if sft is not None:
        schedules["sft.optimizer"] = sft.optimizer
    for key, adamw in schedules.items():
        if adamw.min_lr > adamw.lr:
            yield Violation(f"{key}.min_lr", adamw.min_lr, f"must not exceed lr = {adamw.lr}")
        if adamw.decay_steps is not None and adamw.decay_steps <= adamw.warmup_steps:
            yield Violation(f"{key}.decay_steps", adamw.decay_steps, f"must exceed warmup_steps = {adamw.warmup_steps}")


@_check("run")
def _check_run(run: RunConfig) -> Iterator[Violation]:
    if (run.mode == "replay") != (run.replay_dir is not None):
        yield Violation("run.replay_dir", run.replay_dir, "belongs to run.mode=replay, which needs it")


@_check("run", "model", "rollout")
def _check_decoding(run: RunConfig, model: ModelConfig, rollout: RolloutConfig) -> Iterator[Violation]:
    if model.implementation == "transformer_engine" and rollout.backend == "embedded" and run.mode != "replay":
        yield Violation(
            "model.implementation",
            model.implementation,
            "embedded rollouts need the masks of the local layers; use local, or run.mode=replay",
        )


@_check("run", "tracking")
def _check_rollout_mode(run: RunConfig, tracking: TrackingConfig) -> Iterator[Violation]:
    if run.mode == "rollout" and not tracking.trajectories:
        yield Violation("tracking.trajectories", False, "run.mode=rollout is for saving them: true")
