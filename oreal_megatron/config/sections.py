"""The sections of a run's configuration: what each key is, and which values it may have."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import Annotated, Literal

from pydantic import Field

from oreal_megatron.config.fields import (
    AsTuple,
    FloatPair,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Section,
    Share,
    Strings,
)
from oreal_megatron.config.fp8_recipes import RecipeName
from oreal_megatron.config.rollout import RolloutConfig, SamplingConfig
from oreal_megatron.verifier.config import VerifierConfig


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

    @property
    def attention_head_dim(self) -> int:
        """Dimension of one attention head: head_dim, or hidden_size / num_attention_heads where it is null."""
        return self.head_dim or self.hidden_size // self.num_attention_heads


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
    direct_shares: Annotated[tuple[Share, Share], AsTuple]
    """Share of the demonstrations that state the answer without working, which a small model rarely gets right: of
    those with min_terms, and of those with max_terms; between them on a line."""
    min_terms: Annotated[int, Field(ge=2, le=6)]
    max_terms: Annotated[int, Field(ge=2, le=6)]
    max_operand: Annotated[int, Field(ge=2, le=999)]
    max_factor: Annotated[int, Field(ge=2, le=99)]
    """Largest operand of a multiplication."""
    operators: Annotated[tuple[Literal["+", "-", "*"], ...], AsTuple, Field(min_length=1)]


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
    difficulty_balance: Annotated[tuple[BalanceBin, ...], AsTuple]
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
    """rich: a progress bar on a terminal; plain: lines only; quiet: nothing."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"]
    """Lowest level that is shown on the console and written to logs/rank_NNNN.log below run.dir."""
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
    """Two steps of this experiment with everything small: model, lengths, data, layout (dry_run.py says how)."""


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
    def served_dtype(self) -> str:
        """What servers compute in, and what weights travel in: of a server in FP8, what it leaves in bfloat16."""
        servers = self.rollout.sglang
        return self.model.dtype if servers is None or servers.dtype is None else "bfloat16"

    @property
    def num_asked_prompts(self) -> int:
        """Prompts that a step asks for."""
        tail = self.rollout.long_tail
        return self.data.prompts_per_step if tail is None else ceil(self.data.prompts_per_step * tail.oversample)
