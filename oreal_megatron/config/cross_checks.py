"""Checks across sections of the configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from oreal_megatron.config.data import DataConfig
from oreal_megatron.config.divisibility import (
    layout_violations,
    served_head_violations,
    served_shape_violations,
    serving_violations,
)
from oreal_megatron.config.errors import Violation
from oreal_megatron.config.fp8_recipes import CAPABILITIES, device_problem, recipes_for
from oreal_megatron.config.optimizer import OptimizerConfig
from oreal_megatron.config.rollout import OPTIONS_SET_BY_RUN, RolloutConfig, SamplingConfig, SGLangConfig
from oreal_megatron.config.sections import (
    EvaluationConfig,
    Fp8Config,
    Fp8ModelConfig,
    ModelConfig,
    ObjectiveConfig,
    ParallelConfig,
    PromptConfig,
    ResourcesConfig,
    RunConfig,
    TrackingConfig,
)
from oreal_megatron.config.sft import SftConfig

CHECKS: list[tuple[tuple[str, ...], Callable[..., Iterator[Violation]]]] = []
"""Checks, each with the sections that it reads."""


def check(*reads: str) -> Callable[[Callable[..., Iterator[Violation]]], Callable[..., Iterator[Violation]]]:
    """Registers a function as a check that is given the sections `reads`, once they are valid."""

    def register(run: Callable[..., Iterator[Violation]]) -> Callable[..., Iterator[Violation]]:
        CHECKS.append((reads, run))
        return run

    return register


@check("model")
def _check_model(model: ModelConfig) -> Iterator[Violation]:
    if model.path is None and model.geometry is None:
        yield Violation(
            "model.path", None, "Set model.path to a Hugging Face directory, or model.geometry for random weights."
        )
    if (g := model.geometry) is None:
        return
    if g.head_dim is None and g.hidden_size % g.num_attention_heads:
        yield Violation(
            "model.geometry.num_attention_heads",
            g.num_attention_heads,
            f"It must divide model.geometry.hidden_size = {g.hidden_size}. Set it to a divisor, or set "
            "model.geometry.head_dim.",
        )
    if g.num_attention_heads % g.num_query_groups:
        yield Violation(
            "model.geometry.num_query_groups",
            g.num_query_groups,
            f"It must divide model.geometry.num_attention_heads = {g.num_attention_heads}. Set it to a divisor.",
        )


@check("model", "parallel")
def _check_layout(model: ModelConfig, parallel: ParallelConfig) -> Iterator[Violation]:
    if model.geometry is not None:
        yield from layout_violations(model.geometry, parallel)


@check("parallel")
def _check_parallel(parallel: ParallelConfig) -> Iterator[Violation]:
    if parallel.sequence and parallel.tensor == 1:
        # Megatron-Core would turn it off layer by layer, without an error.
        remedy = "It splits tokens over tensor ranks. Set parallel.sequence=false, or parallel.tensor above 1."
        yield Violation("parallel.sequence", True, remedy)
    if parallel.virtual_pipeline > 1 and parallel.pipeline == 1:
        remedy = "It interleaves pipeline stages. Set parallel.virtual_pipeline=1, or parallel.pipeline above 1."
        yield Violation("parallel.virtual_pipeline", parallel.virtual_pipeline, remedy)


@check("fp8", "model", "parallel", "resources")
def _check_fp8(
    fp8: Fp8Config, model: ModelConfig, parallel: ParallelConfig, resources: ResourcesConfig
) -> Iterator[Violation]:
    for name, settings in fp8.models.items():
        yield from _fp8_violations(f"fp8.{name}", settings, is_trained=name != "reference", parallel=parallel)
        capability = CAPABILITIES.get(resources.device)
        if capability is not None and (problem := device_problem(settings.recipe, capability)):
            possible = recipes_for(capability)
            change = f"Set it to {' or '.join(possible)}" if possible else "Set fp8=none"
            remedy = f"On resources.device={resources.device}, {problem}. {change}."
            yield Violation(f"fp8.{name}.recipe", settings.recipe, remedy)
    if fp8.models and model.implementation == "local":
        # Megatron-Core ignores FP8 in its own layers, without an error.
        remedy = "Only Transformer Engine has FP8. Set model.implementation=transformer_engine, or fp8=none."
        yield Violation("model.implementation", model.implementation, remedy)
    if fp8.models and model.dtype != "bfloat16":
        remedy = "With FP8, all else is computed in bfloat16. Set model.dtype=bfloat16, or fp8=none."
        yield Violation("model.dtype", model.dtype, remedy)


def _fp8_violations(
    key: str, fp8: Fp8ModelConfig, *, is_trained: bool, parallel: ParallelConfig
) -> Iterator[Violation]:
    if fp8.recipe == "delayed" and not is_trained:
        remedy = f"Its scales come from training passes, which this model has none of. Set {key}.recipe=tensorwise."
        yield Violation(f"{key}.recipe", fp8.recipe, remedy)
    if fp8.recipe == "delayed" and fp8.amax_history is None:
        remedy = f"Recipe delayed needs a history. Set {key}.amax_history=1024."
        yield Violation(f"{key}.amax_history", None, remedy)
    if fp8.recipe != "delayed" and fp8.amax_history is not None:
        remedy = f"Only recipe delayed has a history. Set {key}.amax_history=null."
        yield Violation(f"{key}.amax_history", fp8.amax_history, remedy)
    for end in ("first", "last"):
        name = f"bf16_{end}_layers"
        if (num_layers := getattr(fp8, name)) and fp8.recipe == "delayed":
            # Its scales are updated at the end of a forward pass in FP8, which must then be one pass, not one a layer.
            remedy = f"Recipe delayed needs all layers in FP8. Set {key}.{name}=0, or another recipe."
            yield Violation(f"{key}.{name}", num_layers, remedy)
    if not fp8.parameters:
        return
    change = f"Set {key}.parameters=false"
    if fp8.recipe == "mxfp8":
        remedy = f"mxfp8 weights live in the gradient buffer, which this trainer frees between steps. {change}."
        yield Violation(f"{key}.parameters", True, remedy)
    if is_trained and not parallel.distributed_optimizer:
        remedy = "Only the distributed optimizer casts master weights to FP8. Set parallel.distributed_optimizer=true, "
        yield Violation(f"{key}.parameters", True, f"{remedy}or {key}.parameters=false.")
    if parallel.offload:
        remedy = f"FP8 weights cannot be offloaded. {change}, or parallel.offload=false."
        yield Violation(f"{key}.parameters", True, remedy)


@check("run", "model", "prompt", "rollout", "evaluation")
def _check_lengths(
    run: RunConfig, model: ModelConfig, prompt: PromptConfig, rollout: RolloutConfig, evaluation: EvaluationConfig
) -> Iterator[Violation]:
    sampled: dict[str, SamplingConfig] = {} if run.mode == "sft" else {"rollout": rollout.sampling}
    sampled |= {"evaluation": evaluation.sampling} if evaluation.benchmarks else {}
    room = model.max_sequence_length - prompt.max_prompt_tokens
    for section, sampling in sampled.items():
        if sampling.max_new_tokens > room:
            change = f"Set it to at most {room}" if room > 0 else "Lower prompt.max_prompt_tokens"
            remedy = f"model.max_sequence_length={model.max_sequence_length} less prompt.max_prompt_tokens="
            remedy += f"{prompt.max_prompt_tokens} leaves {room} tokens. {change}, or raise model.max_sequence_length."
            yield Violation(f"{section}.sampling.max_new_tokens", sampling.max_new_tokens, remedy)


@check("prompt")
def _check_prompt(prompt: PromptConfig) -> Iterator[Violation]:
    if "{question}" not in prompt.user:
        yield Violation("prompt.user", prompt.user, "It has no place for the question. Put {question} into it.")


@check("data", "run")
def _check_data(data: DataConfig, run: RunConfig) -> Iterator[Violation]:
    if data.train is None and data.arithmetic is None and run.num_steps:
        remedy = "There are no prompts. Set data.train to a file, data=arithmetic, or run.num_steps=0."
        yield Violation("data.train", None, remedy)
    if data.train == {}:
        yield Violation("data.train", {}, "There is no source in it. Set it to a file, or to sources by name.")
    sources = data.train if isinstance(data.train, Mapping) else {}
    weights = {name: source.weight for name, source in sources.items()}
    if None in weights.values() and any(weights.values()):
        for name in (name for name, weight in weights.items() if weight is None):
            remedy = "Other sources have a weight. Set one for each source, or none."
            yield Violation(f"data.train.{name}.weight", None, remedy)
    if (a := data.arithmetic) is not None and a.min_terms > a.max_terms:
        remedy = f"Set it to at most data.arithmetic.max_terms={a.max_terms}."
        yield Violation("data.arithmetic.min_terms", a.min_terms, remedy)
    if data.curriculum is not None and not data.difficulty_balance:
        remedy = (
            "It changes the balance by difficulty, and there is none. Set data.difficulty_balance, or this to null."
        )
        yield Violation("data.curriculum", data.curriculum.model_dump(), remedy)
    for index, bin in enumerate(data.difficulty_balance):
        if bin.low >= bin.high:
            yield Violation(f"data.difficulty_balance.{index}.low", bin.low, f"Set it below high={bin.high}.")


@check("rollout", "model")
def _check_served_heads(rollout: RolloutConfig, model: ModelConfig) -> Iterator[Violation]:
    if rollout.sglang is not None and model.geometry is not None:
        yield from served_head_violations(rollout.sglang, model.geometry)


@check("rollout", "model", "resources")
def _check_served_fp8(rollout: RolloutConfig, model: ModelConfig, resources: ResourcesConfig) -> Iterator[Violation]:
    if (servers := rollout.sglang) is not None and servers.dtype == "fp8":
        yield from serving_violations(servers, CAPABILITIES.get(resources.device))
        if model.geometry is not None:
            yield from served_shape_violations(servers, model.geometry)


@check("rollout", "parallel", "resources")
def _check_resources(
    rollout: RolloutConfig, parallel: ParallelConfig, resources: ResourcesConfig
) -> Iterator[Violation]:
    trainers, servers = resources.trainer_devices, rollout.sglang
    # CPU servers share cores with all other processes, so their number is free.
    on_gpus = servers is not None and servers.device == "cuda"
    if servers is not None and on_gpus and not servers.urls and servers.tensor > resources.devices_per_node:
        yield Violation(
            "rollout.sglang.tensor",
            servers.tensor,
            "The run starts each server on one node. Set it to at most resources.devices_per_node="
            f"{resources.devices_per_node}, and rollout.sglang.num_servers to more servers. If the weights do not fit, "
            "rollout.sglang.dtype=fp8 halves them.",
        )
    if trainers is None:
        if servers is not None and servers.placement == "colocated":
            remedy = "Colocated servers share the trainer's devices. Set it to the number of these devices."
            yield Violation("resources.trainer_devices", None, remedy)
        return
    replica = parallel.tensor * parallel.pipeline * parallel.context
    if trainers % replica:
        yield Violation(
            "resources.trainer_devices",
            trainers,
            f"A model replica has {replica} devices: parallel.tensor={parallel.tensor} x parallel.pipeline="
            f"{parallel.pipeline} x parallel.context={parallel.context}. Set it to a multiple of {replica}.",
        )
    shares = servers is not None and servers.placement == "colocated" and on_gpus
    if servers is not None and shares and servers.num_servers * servers.tensor != trainers:
        yield Violation(
            "rollout.sglang.num_servers",
            servers.num_servers,
            f"Colocated servers must use all {trainers} trainer devices, and {servers.num_servers} servers of "
            f"{servers.tensor} devices do not. Set rollout.sglang.num_servers={trainers // servers.tensor}.",
        )
    if parallel.tensor > resources.devices_per_node:
        yield Violation(
            "parallel.tensor",
            parallel.tensor,
            "Tensor ranks must be on one node. Set it to at most resources.devices_per_node="
            f"{resources.devices_per_node}.",
        )


@check("data", "evaluation")
def _check_generated(data: DataConfig, evaluation: EvaluationConfig) -> Iterator[Violation]:
    for name, benchmark in evaluation.benchmarks.items():
        if benchmark.path is None and data.arithmetic is None:
            key = f"evaluation.benchmarks.{name}.path"
            yield Violation(key, None, "There are no problems. Set it to a JSONL file, or set data=arithmetic.")


@check("model", "sft")
def _check_start(model: ModelConfig, sft: SftConfig | None) -> Iterator[Violation]:
    if model.path is None and sft is None:
        remedy = "A model with random weights solves nothing. Set model.path, or a warm start, such as sft=arithmetic."
        yield Violation("model.path", None, remedy)


@check("evaluation")
def _check_evaluation(evaluation: EvaluationConfig) -> Iterator[Violation]:
    for name, benchmark in evaluation.benchmarks.items():
        if benchmark.samples and evaluation.sampling.temperature == 0:
            key = f"evaluation.benchmarks.{name}.samples"
            remedy = "At evaluation.sampling.temperature=0 all samples are equal. Set a temperature above 0, or "
            yield Violation(key, benchmark.samples, f"{remedy}{key}=0.")


@check("rollout")
def _check_rollout(rollout: RolloutConfig) -> Iterator[Violation]:
    if rollout.backend == "sglang" and rollout.sglang is None:
        yield Violation("rollout.backend", "sglang", "It needs settings of its servers. Set rollout=sglang.")
    if rollout.backend != "sglang" and rollout.sglang is not None:
        yield Violation("rollout.backend", rollout.backend, "It has no servers. Set rollout.sglang=null.")
    if rollout.long_tail is not None and rollout.backend == "embedded":
        remedy = "It generates a batch as a whole and cannot stop early. Set rollout.long_tail=null, or rollout=sglang."
        yield Violation("rollout.backend", "embedded", remedy)
    if rollout.long_tail is not None and rollout.generation is not None:
        remedy = (
            "A response of several turns cannot be broken off. Set rollout.long_tail=null, or rollout.generation=null."
        )
        yield Violation("rollout.long_tail", rollout.long_tail.model_dump(), remedy)
    if (shares := rollout.undecided) is not None and shares.warn > shares.stop:
        remedy = f"Set it to at most rollout.undecided.stop={shares.stop}."
        yield Violation("rollout.undecided.warn", shares.warn, remedy)
    if (limits := rollout.mismatch) is not None:
        if limits.warn > limits.stop:
            yield Violation(
                "rollout.mismatch.warn", limits.warn, f"Set it to at most rollout.mismatch.stop={limits.stop}."
            )
        if rollout.sampling.temperature != 1.0:
            yield Violation(
                "rollout.sampling.temperature",
                rollout.sampling.temperature,
                "Log-probabilities of rollouts equal the policy's at temperature 1 only. Set "
                "rollout.sampling.temperature=1.0, or rollout.mismatch=null.",
            )


@check("rollout")
def _check_servers(rollout: RolloutConfig) -> Iterator[Violation]:
    if (servers := rollout.sglang) is None:
        return
    for index, url in enumerate(servers.urls):
        if not url.startswith(("http://", "https://")) or url.endswith("/"):
            yield Violation(f"rollout.sglang.urls.{index}", url, "Set it to a URL of the form http://host:port.")
    if len(set(servers.urls)) < len(servers.urls):
        yield Violation("rollout.sglang.urls", servers.urls, "It names a server twice. Name each server once.")
    last_port = 65535 - servers.num_servers + 1
    if servers.port is not None and not servers.urls and servers.port > last_port:
        remedy = f"{servers.num_servers} servers need as many ports. Set it to at most {last_port}."
        yield Violation("rollout.sglang.port", servers.port, remedy)
    if servers.shares_devices and servers.device == "cuda" and servers.transport in ("direct", "broadcast"):
        remedy = "NCCL has no groups with two processes on one device. Set rollout.sglang.transport=ipc or disk."
        yield Violation("rollout.sglang.transport", servers.transport, remedy)
    if servers.full_every > 1 and (reason := _needs_all_weights(servers)) is not None:
        yield Violation("rollout.sglang.full_every", servers.full_every, f"{reason} Set it to 1.")
    for name in servers.arguments:
        if (setter := OPTIONS_SET_BY_RUN.get(name.replace("_", "-"))) is not None:
            remedy = f"The run sets this option {setter}. Remove it here."
            yield Violation(f"rollout.sglang.arguments.{name}", servers.arguments[name], remedy)


def _needs_all_weights(servers: SGLangConfig) -> str | None:
    """Returns the reason why changes alone cannot be sent to servers, or None."""
    if servers.transport != "direct":
        return f"With rollout.sglang.transport={servers.transport} all weights are sent."
    if servers.dtype == "fp8":
        return "Servers in FP8 hold rounded weights, to which changes cannot be added."
    if servers.shares_devices:
        return "Colocated servers release their weights while the trainer works."
    return None


@check("rollout", "parallel")
def _check_control_time(rollout: RolloutConfig, parallel: ParallelConfig) -> Iterator[Violation]:
    servers = rollout.sglang
    if servers is not None and servers.control_seconds >= parallel.timeout_seconds:
        remedy = (
            "The trainer's ranks wait for servers during a publication. Set it below parallel.timeout_seconds="
            f"{parallel.timeout_seconds}."
        )
        yield Violation("rollout.sglang.control_seconds", servers.control_seconds, remedy)


@check("objective", "rollout")
def _check_objective(objective: ObjectiveConfig, rollout: RolloutConfig) -> Iterator[Violation]:
    o = objective
    if o.reward_values[0] >= o.reward_values[1]:
        remedy = "The first value, of incorrect responses, must be the smaller one. Set, for example, [-1.0, 1.0]."
        yield Violation("objective.reward_values", o.reward_values, remedy)
    if o.clip is not None and "logprob" in (o.positive_term, o.negative_term):
        remedy = "It clips ratios, and a term has log-probabilities. Set objective.positive_term=ratio and objective."
        yield Violation("objective.clip", o.clip, f"{remedy}negative_term=ratio, or objective.clip=null.")
    elif o.clip is not None and o.ratio_reference == "self" and o.updates.number == 1:
        remedy = "With one update a step, ratios to the policy itself are 1. Set objective.ratio_reference=rollout, or "
        yield Violation("objective.clip", o.clip, f"{remedy}objective.updates.epochs=2, or objective.clip=null.")
    if o.updates.number > 1 and o.sampler == "release":
        remedy = "The release's sampler repeats responses of a whole step. Set objective.sampler=exact, or both to 1."
        yield Violation("objective.updates", o.updates.model_dump(), remedy)
    if o.importance_limit is not None and o.ratio_reference != "self":
        remedy = "A ratio to the rollout is an importance weight already. Set objective.ratio_reference=self, or "
        yield Violation("objective.importance_limit", o.importance_limit, f"{remedy}objective.importance_limit=null.")
    bands = {"token": o.importance_token_band, "response": o.importance_response_band}
    for name, band in bands.items():
        if band is not None and not 0.0 <= band[0] <= 1.0 <= band[1]:
            remedy = "Rollouts of the policy itself have the ratio 1. Set a band around it, such as [0.5, 2.0]."
            yield Violation(f"objective.importance_{name}_band", band, remedy)
    by_rollout = o.ratio_reference == "rollout" or o.importance_limit is not None or any(bands.values())
    if by_rollout and rollout.sampling.temperature != 1.0:
        yield Violation(
            "rollout.sampling.temperature",
            rollout.sampling.temperature,
            f"Objective {o.preset} divides by the rollout's probabilities, which equal the policy's at temperature 1 "
            "only. Set rollout.sampling.temperature=1.0.",
        )
    if o.selection == "pair" and o.keep_groups != "mixed":
        remedy = "Only mixed groups have a correct and an incorrect response. Set objective.keep_groups=mixed."
        yield Violation("objective.selection", o.selection, remedy)
    of_one_outcome = o.selection in ("correct", "incorrect") and o.reward_model.responses == "trained"
    if o.uses_reward_model and of_one_outcome:
        remedy = "The reward model would learn from responses of one outcome alone and give them all the same score. "
        remedy += "Set objective.selection=all or pair, objective.reward_model.responses=all, or "
        remedy += "objective.token_weights.source=ones."
        yield Violation("objective.selection", o.selection, remedy)
    if o.token_weights.top_share is not None and o.token_weights.form != "confidence":
        remedy = "Set objective.token_weights.form=confidence, or objective.token_weights.top_share=null."
        yield Violation("objective.token_weights.top_share", o.token_weights.top_share, remedy)
    if o.reward_model.ranking_weight and o.sampler == "release":
        remedy = "The release's sampler repeats responses, which would count pairs twice. Set objective.sampler=exact."
        yield Violation("objective.reward_model.ranking_weight", o.reward_model.ranking_weight, remedy)
    needs_group = o.keep_groups == "mixed" or o.shaping in ("rloo", "grpo")
    if needs_group and rollout.samples_per_prompt < 2:
        yield Violation(
            "rollout.samples_per_prompt",
            rollout.samples_per_prompt,
            f"Objective {o.preset} compares the responses of a group. Set it to at least 2.",
        )
    if rollout.sampling.temperature == 0 and needs_group:
        remedy = "Greedy responses to a prompt are all equal. Set a temperature above 0."
        yield Violation("rollout.sampling.temperature", 0.0, remedy)


@check("objective", "run")
def _check_freeze(objective: ObjectiveConfig, run: RunConfig) -> Iterator[Violation]:
    frozen = objective.actor_freeze_steps
    if frozen and not objective.uses_reward_model and frozen >= run.num_steps > 0:
        remedy = f"Nothing would train in run.num_steps={run.num_steps} steps. Set it to 0, or below run.num_steps."
        yield Violation("objective.actor_freeze_steps", frozen, remedy)


@check("optimizer", "sft")
def _check_schedules(optimizer: OptimizerConfig, sft: SftConfig | None) -> Iterator[Violation]:
    schedules = {"optimizer.policy": optimizer.policy, "optimizer.reward_model": optimizer.reward_model}
    if sft is not None:
        schedules["sft.optimizer"] = sft.optimizer
    for key, adamw in schedules.items():
        if adamw.min_lr > adamw.lr and adamw.decay != "constant":
            yield Violation(f"{key}.min_lr", adamw.min_lr, f"Set it to at most {key}.lr={adamw.lr}.")
        if adamw.decay_steps is not None and adamw.decay_steps <= adamw.warmup_steps:
            remedy = f"The decay includes the warm-up. Set it above {key}.warmup_steps={adamw.warmup_steps}."
            yield Violation(f"{key}.decay_steps", adamw.decay_steps, remedy)


@check("run")
def _check_run(run: RunConfig) -> Iterator[Violation]:
    if run.mode == "replay" and run.replay_dir is None:
        remedy = "run.mode=replay needs it. Set it to the trajectories/ directory of a run."
        yield Violation("run.replay_dir", None, remedy)
    if run.mode != "replay" and run.replay_dir is not None:
        remedy = "Only run.mode=replay reads it. Set run.replay_dir=null, or run.mode=replay."
        yield Violation("run.replay_dir", run.replay_dir, remedy)


@check("run", "model", "rollout", "evaluation")
def _check_decoding(
    run: RunConfig, model: ModelConfig, rollout: RolloutConfig, evaluation: EvaluationConfig
) -> Iterator[Violation]:
    generates = bool(evaluation.benchmarks) if run.mode == "sft" else run.mode != "replay"
    if model.implementation == "transformer_engine" and rollout.backend == "embedded" and generates:
        remedy = "Embedded rollouts need the attention masks of the local layers. Set model.implementation=local, "
        remedy += "rollout=sglang, or evaluation=none." if run.mode == "sft" else "rollout=sglang, or run.mode=replay."
        yield Violation("model.implementation", model.implementation, remedy)


@check("tracking", "resources")
def _check_recorded_steps(tracking: TrackingConfig, resources: ResourcesConfig) -> Iterator[Violation]:
    for name, steps in (("profile", tracking.profile), ("timeline", tracking.timeline)):
        if steps is not None and steps[0] > steps[1]:
            remedy = f"The last step comes before the first. Set it to [{steps[1]},{steps[0]}]."
            yield Violation(f"tracking.{name}", steps, remedy)
    if tracking.memory_snapshot and tracking.profile is None:
        remedy = "Snapshots are of profiled steps. Set tracking.profile, such as [3,4]."
        yield Violation("tracking.memory_snapshot", True, remedy)
    if tracking.memory_snapshot and resources.device == "cpu":
        remedy = "A CPU's memory has no snapshots. Set it to false, or resources to that of a GPU."
        yield Violation("tracking.memory_snapshot", True, remedy)


@check("rollout", "tracking")
def _check_prometheus_port(rollout: RolloutConfig, tracking: TrackingConfig) -> Iterator[Violation]:
    servers, port = rollout.sglang, tracking.prometheus_port
    if servers is None or servers.urls or servers.port is None or port is None:
        return
    if servers.port <= port < servers.port + servers.num_servers:
        remedy = "It is the port of a server (rollout.sglang.port). Set it to a port before or after theirs."
        yield Violation("tracking.prometheus_port", port, remedy)


@check("run", "tracking")
def _check_rollout_mode(run: RunConfig, tracking: TrackingConfig) -> Iterator[Violation]:
    if run.mode == "rollout" and not tracking.trajectories:
        remedy = "run.mode=rollout writes trajectories and nothing else. Set tracking.trajectories=true."
        yield Violation("tracking.trajectories", False, remedy)
