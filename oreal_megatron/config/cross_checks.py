"""What the sections must agree on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

from oreal_megatron.config.divisibility import (
    layout_violations,
    served_head_violations,
    served_shape_violations,
    serving_violations,
)
from oreal_megatron.config.errors import Violation
from oreal_megatron.config.fp8_recipes import CAPABILITIES, device_problem, recipes_for
from oreal_megatron.config.rollout import RolloutConfig
from oreal_megatron.config.sections import (
    DataConfig,
    EvaluationConfig,
    Fp8Config,
    Fp8ModelConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ParallelConfig,
    PromptConfig,
    ResourcesConfig,
    RunConfig,
    SftConfig,
    TrackingConfig,
)


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
        yield from layout_violations(model.geometry, parallel)


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
    if rollout.sglang is not None and model.geometry is not None:
        yield from served_head_violations(rollout.sglang, model.geometry)


@_check("rollout", "model", "resources")
def _check_served_fp8(rollout: RolloutConfig, model: ModelConfig, resources: ResourcesConfig) -> Iterator[Violation]:
    if (servers := rollout.sglang) is not None and servers.dtype == "fp8":
        yield from serving_violations(servers, CAPABILITIES.get(resources.device))
        if model.geometry is not None:
            yield from served_shape_violations(servers, model.geometry)


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
    if servers.shares_devices and servers.device == "cuda" and servers.transport in ("direct", "broadcast"):
        remedy = "two processes on one device cannot be in one NCCL group: ipc, or disk"
        yield Violation("rollout.sglang.transport", servers.transport, remedy)
    # Servers on the trainer's devices are each on the machine of the ranks beside them.
    if servers.transport == "ipc" and elsewhere and not servers.shares_devices:
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
    "enable-memory-saver": "is set by rollout.sglang.placement",
    "base-gpu-id": "is set by rollout.sglang.placement",
    "host": "is rollout.sglang.host",
    "port": "is rollout.sglang.port",
    "device": "is rollout.sglang.device",
    "mem-fraction-static": "is rollout.sglang.memory_share",
    "tp": "is rollout.sglang.tensor",
    "tp-size": "is rollout.sglang.tensor",
    "tensor-parallel-size": "is rollout.sglang.tensor",
    "dtype": "is rollout.sglang.dtype",
    "context-length": "is model.max_sequence_length",
    "max-running-requests": "is rollout.sglang.max_concurrency",
    "skip-tokenizer-init": "is always set: token ids go in and out",
    "quantization": "is rollout.sglang.dtype: SGLang loads no new weights into layers that it has quantised itself",
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
