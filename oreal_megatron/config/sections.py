"""Sections of the configuration, key by key: type, allowed values and description."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import Annotated, Literal

from pydantic import Field

from oreal_megatron.config.data import DataConfig
from oreal_megatron.config.fields import (
    AsPath,
    Day,
    FileName,
    Function,
    NonNegative,
    Port,
    Positive,
    Section,
    Seed,
    StepRange,
    Strings,
    Text,
)
from oreal_megatron.config.fp8_recipes import RecipeName
from oreal_megatron.config.geometry import GeometryConfig
from oreal_megatron.config.objective import ObjectiveConfig
from oreal_megatron.config.optimizer import OptimizerConfig
from oreal_megatron.config.rollout import RolloutConfig, SamplingConfig
from oreal_megatron.config.sft import SftConfig
from oreal_megatron.verifier.config import VerifierConfig


class ModelConfig(Section):
    """The model that policy, reference and reward model start from."""

    path: Text | None
    """Hugging Face model directory with config.json, tokenizer and safetensors. null: random weights with the shape of
    model.geometry."""
    geometry: GeometryConfig | None
    """Shape of a model with random weights. With model.path, the shape that its config.json must have; null: accept
    any."""
    tokenizer: Text
    """Hugging Face directory of the tokenizer, or `arithmetic` for the built-in tokenizer of data=arithmetic."""
    implementation: Literal["local", "transformer_engine"]
    """Layers of the model. local: Megatron-Core's own, on any device; transformer_engine: Transformer Engine's, which
    need CUDA and are needed for FP8."""
    dtype: Literal["float32", "bfloat16"]
    """Data type of weights and computation. With bfloat16, gradients, optimizer states and master weights stay in
    float32."""
    max_sequence_length: Positive
    """Longest prompt and response together, in tokens."""
    reward_model: Text | None = None
    """Checkpoint directory of another run, whose reward model's weights this run's reward model starts from. null: the
    initial policy with a scalar head of zeros."""
    logprob_chunk_tokens: Positive = 1024
    """Number of positions whose logits are in memory at the same time. Fewer take less memory and more time."""


class Fp8ModelConfig(Section):
    """FP8 matrix products in one model's layers. Embedding, output layer, attention and norms stay in model.dtype."""

    recipe: RecipeName
    """Elements that share a scale, and the source of the scale. delayed: a tensor, from earlier passes; tensorwise: a
    tensor, from itself; blockwise: blocks of 1 x 128 or 128 x 128; mxfp8: blocks of 32, powers of two."""
    format: Literal["e4m3", "hybrid"]
    """Format of gradients. e4m3, or hybrid: e5m2. Weights and activations are e4m3."""
    bf16_first_layers: NonNegative
    """Number of layers at the start of the model that stay in bf16."""
    bf16_last_layers: NonNegative
    """Number of layers at the end of the model that stay in bf16."""
    amax_history: Positive | None
    """Number of earlier passes whose largest value sets the scale of recipe `delayed`. null for all other recipes."""
    parameters: bool
    """Keep the weights themselves in FP8; the distributed optimizer then also gathers them in FP8. The float32 master
    weights stay."""


class Fp8Config(Section):
    """FP8 settings of each model. A warm start always computes in model.dtype."""

    policy: Fp8ModelConfig | None
    """FP8 in the policy. null: none."""
    reward_model: Fp8ModelConfig | None
    """FP8 in the reward model. null: none."""
    reference: Fp8ModelConfig | None
    """FP8 in the reference model. null: none."""

    @property
    def models(self) -> dict[str, Fp8ModelConfig]:
        """Settings of the models that compute in FP8, by model name."""
        named = {"policy": self.policy, "reward_model": self.reward_model, "reference": self.reference}
        return {name: model for name, model in named.items() if model is not None}


class PromptConfig(Section):
    """Rendering of a question as the token ids of a prompt, through the model's chat template."""

    system: str | None
    """System message. null: none."""
    user: str
    """User message. `{question}` in it is replaced by the question."""
    stop_token: Annotated[str, Field(min_length=1)]
    """Token that ends a response, as text."""
    thinking_end_marks: Strings
    """Marks that end the reasoning of a response. The text after the last mark is the final answer."""
    max_prompt_tokens: Positive
    """Longest prompt, in tokens. Longer training prompts are left out, and a benchmark with longer prompts is
    refused."""
    date: Day | None = None
    """Day that a chat template with a clock (`strftime_now`) shows, such as 2026-11-29. null: the day on which the run
    began, which its config.yaml then has. Templates without a clock show none."""
    function: Function | None = None
    """Function of one's own that makes the messages of a question, in place of `system` and `user`; docs/extending.md
    has its arguments. null: none."""


class ParallelConfig(Section):
    """Split of models over processes. The processes that remain are data-parallel replicas."""

    tensor: Positive
    """Ranks that share every matrix."""
    pipeline: Positive
    """Pipeline stages; each holds a share of the layers."""
    virtual_pipeline: Positive = 1
    """Runs of layers that each stage holds under the interleaved schedule. 1: the plain 1F1B schedule."""
    context: Positive = 1
    """Ranks that share every sequence."""
    sequence: bool = False
    """Sequence parallelism: split tokens of norms and residuals over the tensor ranks. Needs parallel.tensor > 1."""
    micro_batch_tokens: Positive
    """Packed tokens of a micro-batch. A longer sequence is a micro-batch of its own."""
    distributed_optimizer: bool = False
    """Split optimizer states and float32 weights over the data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Reduce gradients bucket by bucket during the last backward pass. false: all at its end."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations that are computed again in the backward pass to save memory. selective: those of the feed-forward
    layers and of unfused attention; full: those of whole layers."""
    fused_weight_gradients: bool = False
    """Add weight gradients to the float32 buffer within the matrix products. Needs NVIDIA's apex."""
    offload: bool = False
    """Keep weights, gradients and optimizer states in host memory between the phases that use them."""
    timeout_seconds: Positive = 600
    """Seconds after which a waiting collective ends the job."""


class ResourcesConfig(Section):
    """Devices that a run is meant for. oreal-plan and oreal-submit count on them; oreal-train checks them."""

    device: Literal["cpu", "a100_80gb", "h100_80gb"]
    """Kind of device. cpu: no GPU is used, by the trainer or by servers that it launches, also where torch sees one."""
    devices_per_node: Positive
    """Devices of a node."""
    trainer_devices: Positive | None
    """Number of trainer processes, one for each device. Servers on their own devices are not counted. null: as many as
    are started."""


class BenchmarkConfig(Section):
    """Evaluation set NAME."""

    path: Text | None
    """File or directory with question and gold_answer, as data.train takes it. null: the held-out problems of
    data.arithmetic."""
    samples: NonNegative = 0
    """Number k of samples for each question, for avg@k and pass@k. Greedy pass@1 is always measured. 0: only greedy."""
    limit: Positive | None = None
    """Number of problems, from the start of the file, that are used. null: all."""


Benchmark = Annotated[BenchmarkConfig, AsPath]
"""A benchmark, which may be given as the path alone."""


class EvaluationConfig(Section):
    """Evaluation of the policy on benchmarks."""

    benchmarks: Mapping[FileName, Benchmark]
    """Evaluation sets by name: +evaluation.benchmarks.NAME=FILE, a JSONL file with question and gold_answer. NAME is in
    all results."""
    every: NonNegative
    """Steps between evaluations. The policy is always evaluated before the first and after the last step. 0: only
    then."""
    sampling: SamplingConfig
    """Sampling for avg@k and pass@k. Greedy answers have the same token limit."""
    servers: NonNegative = 0
    """Number of the servers, the last ones of rollout.sglang, that evaluate while the run trains and generate nothing
    else. They keep the weights of an evaluation until it has ended. 0: training waits for its evaluations."""
    functions: Mapping[FileName, Function] = {}
    """Metrics of one's own by name, each a function of a benchmark's responses; docs/extending.md has its arguments."""


class TrackingConfig(Section):
    """Output and records of a run."""

    console: Literal["rich", "plain", "quiet"]
    """Output on the console. rich: a progress bar on a terminal; plain: lines only; quiet: nothing."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"]
    """Lowest level of messages on the console and in logs/rank_NNNN.log below run.dir."""
    tensorboard: bool
    """Write metrics for TensorBoard to run.dir."""
    wandb: Literal["disabled", "offline", "online"]
    """Mode of Weights & Biases. offline: write to run.dir, for `wandb sync`."""
    wandb_project: Text
    """Project in Weights & Biases."""
    prometheus_port: Port | None = None
    """Port on which the main process serves the latest metrics to Prometheus, unencrypted and to everyone, while it
    runs (docs/metrics.md). null: none."""
    trajectories: bool
    """Write every step's graded rollouts to trajectories/ below run.dir."""
    report: bool
    """Write report.html to run.dir at the end of the run."""
    function: Function | None = None
    """Function of one's own that gets every record of metrics.jsonl; docs/extending.md has its arguments. null:
    none."""
    profile: StepRange | None
    """First and last step that torch's profiler records, such as [3, 4]: traces/ below run.dir has a trace of each rank
    and step, for https://ui.perfetto.dev. null: none."""
    timeline: StepRange | None
    """First and last step whose timeline is written, such as [3, 4]: phases of the trainer, and requests and states of
    the servers, as one trace in timeline/ below run.dir, for https://ui.perfetto.dev. null: none."""
    memory_snapshot: bool
    """Write a snapshot of the device's memory with each trace, for https://pytorch.org/memory_viz. Needs a GPU."""


class RunConfig(Section):
    """The run: its directory, its length, its checkpoints."""

    name: Text
    """Name of the run in wandb, in the report and in SLURM."""
    dir: Text
    """Directory that the run writes to. A run that is started again in the same directory continues from its newest
    checkpoint."""
    seed: Seed
    """Seed that every other seed of the run is derived from."""
    num_steps: NonNegative
    """Number of steps. 0: only make the initial policy and evaluate it, for which data.train may be null. With `mode:
    sft` it is 0, and sft.steps or sft.epochs is the length."""
    mode: Literal["train", "rollout", "replay", "sft"]
    """Kind of a step. train: all parts of OREAL; rollout: generate, verify and save trajectories; replay: train on
    saved trajectories; sft: an update of supervised fine-tuning, as the section sft says."""
    replay_dir: Text | None
    """The trajectories/ directory of another run, for `mode: replay`. null for all other modes."""
    checkpoint_every: NonNegative
    """Steps between checkpoints. 0: only at the end."""
    keep_checkpoints: Positive
    """Number of recent checkpoints to keep, besides the best by evaluation."""
    export: Literal["none", "best", "every"]
    """Checkpoints that are also written in Hugging Face format, to huggingface/ below run.dir. best: the best by
    evaluation, or the newest without evaluation; every: all checkpoints that are kept."""
    async_checkpoints: bool
    """Write checkpoints in the background, from a copy of the state. The last checkpoint is always waited for."""
    threads: Positive | None
    """CPU threads of a process. null: torch's default."""
    dry_run: bool = False
    """Run two steps of this experiment with small model, lengths, data and layout, on CPU (docs/slurm.md)."""


class TrainConfig(Section):
    """Configuration of a run."""

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
    def is_sft(self) -> bool:
        """Whether the run is supervised fine-tuning, of the policy alone."""
        return self.run.mode == "sft"

    @property
    def data_paths(self) -> dict[str, str]:
        """Files and directories of prompts, demonstrations and benchmarks, by the key that names them."""
        benchmarks = {
            f"evaluation.benchmarks.{name}.path": one.path for name, one in self.evaluation.benchmarks.items()
        }
        return {
            **self.data.train_paths,
            **(self.sft.paths if self.sft is not None else {}),
            **{key: path for key, path in benchmarks.items() if path is not None},
        }

    @property
    def trains_reward_model(self) -> bool:
        return not self.is_sft and self.objective.uses_reward_model

    @property
    def generates(self) -> bool:
        """Whether the run generates responses, for training or for evaluation."""
        return bool(self.evaluation.benchmarks) if self.is_sft else self.run.mode != "replay"

    @property
    def served_dtype(self) -> str:
        """Data type in which servers compute and weights travel; bfloat16 for servers with FP8 weights."""
        servers = self.rollout.sglang
        return self.model.dtype if servers is None or servers.dtype is None else "bfloat16"

    @property
    def num_asked_prompts(self) -> int:
        """Number of prompts that a step generates responses for, rollout.long_tail.oversample included."""
        tail = self.rollout.long_tail
        return self.data.prompts_per_step if tail is None else ceil(self.data.prompts_per_step * tail.oversample)
