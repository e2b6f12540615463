"""Memory of every rank in every phase, from counted footprints: does this configuration fit, and by how much?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from oreal_megatron.config import SGLangConfig, TrainConfig
from oreal_megatron.planner.footprints import DecodedBatch, RankFootprint
from oreal_megatron.planner.hardware import FULL, SURE, Device
from oreal_megatron.planner.sizes import Sizes, linear_parameters, num_parameters, rollouts_per_step

PHASES = ("generate", "score", "train reward model", "train policy", "reshard", "save")
_BUCKETS = {"direct": 1, "ipc": 3, "broadcast": 3, "disk": 0}
"""Buckets that a rank has at once on their way to the servers, by transport: one in two halves, or two that travel and
a third where other ranks' parts arrive."""
_GRADIENT_BUCKET = 40_000_000
"""Elements of Megatron-Core's gradient buckets where their reduction is overlapped; a million a data rank at least."""


@dataclass(frozen=True)
class PhaseMemory:
    """Bytes on one device in one phase, by what they are for."""

    where: str
    """`stage 0`, ..., or `server`."""
    phase: str
    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class SharedDevice:
    """Shares of a device's memory while colocated servers generate."""

    taken: float
    """By a server's weights and KV cache."""
    left: float
    """By what the trainer keeps there, and the server's workspace."""


@dataclass(frozen=True, kw_only=True)
class KvCache:
    """Room for sequences that are being generated."""

    where: str
    """Whose: `server` or `trainer rank`."""
    num_holders: int
    """Servers, or trainer replicas."""
    tokens: int
    """Of one holder."""
    sequences_at_limit: int
    """Of the longest length that fit at the same time."""
    bytes_per_token: int
    """On one device."""
    shared: SharedDevice | None = None
    """Of colocated servers on devices with a memory of their own."""


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    device: Device
    phases: Sequence[PhaseMemory]
    kv_cache: KvCache
    host_bytes_per_node: int
    """Host memory: what is offloaded, and the copy that a checkpoint is written from."""

    @property
    def worst(self) -> PhaseMemory:
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def share(self) -> float:
        return self.worst.total / self.device.memory

    @property
    def problems(self) -> list[str]:
        """Why it cannot run; empty where it fits."""
        found = []
        if self.share > FULL:
            found.append(
                f"{self.worst.where} needs {amount(self.worst.total)} to {self.worst.phase}, "
                f"{self.device.name} has {amount(self.device.memory)}, of which {FULL:.0%} can be counted on"
            )
        if (shared := self.kv_cache.shared) is not None and shared.taken > shared.left:
            found.append(
                f"servers take {shared.taken:.0%} of a device on which the trainer leaves {shared.left:.0%} while they "
                f"generate: rollout.sglang.memory_share={max(int(100 * shared.left), 1) / 100}"
            )
        if self.kv_cache.sequences_at_limit < 1:
            found.append(
                f"the KV cache of a {self.kv_cache.where} holds {self.kv_cache.tokens} tokens, less than one sequence "
                "of model.max_sequence_length"
            )
        return found

    @property
    def verdict(self) -> str:
        if self.problems:
            return "does not fit"
        return "fits" if self.share <= SURE else "tight"


def memory_plan(sizes: Sizes, footprints: Sequence[RankFootprint], device: Device) -> MemoryPlan:
    """footprints: one a pipeline stage."""
    config = sizes.config
    phases = [memory for footprint in footprints for memory in _trainer_phases(sizes, footprint, device)]
    kv_cache, server = _kv_cache(sizes, footprints, device, phases)
    phases = [*phases, *server]
    per_node = min(config.resources.devices_per_node, sizes.num_devices)
    return MemoryPlan(
        device=device, phases=phases, kv_cache=kv_cache, host_bytes_per_node=per_node * _host_bytes(sizes, footprints)
    )


def _trainer_phases(sizes: Sizes, footprint: RankFootprint, device: Device) -> list[PhaseMemory]:
    config, where = sizes.config, f"stage {footprint.stage}"
    trains_rm = config.objective.uses_reward_model
    policy = _trained("policy", footprint.policy_parameters, sizes)
    reward_model = _trained("reward_model", footprint.reward_model_parameters, sizes) if trains_rm else {}
    reference = {"reference weights": int(footprint.policy_parameters * sizes.weight_bytes("reference"))}
    policy_weights = {"policy weights": policy["policy weights"]}
    # Without offload everything is there all the time; with it, what the phase uses.
    everything = policy | reward_model | reference
    asleep = {"servers asleep": device.server_asleep} if _colocated(config) else {}

    def phase(name: str, used: Mapping[str, int], more: Mapping[str, int]) -> PhaseMemory:
        resident = used if config.parallel.offload else everything
        overhead = {"framework": device.overhead} if device.overhead else {}
        return PhaseMemory(where, name, {k: v for k, v in {**resident, **more, **overhead}.items() if v})

    # Colocated servers fill what is left: their check is the room for the KV cache.
    generating: dict[str, int] = {}
    if (decoding := footprint.decoding) is not None:
        generating = {"KV cache": decoding.cache, "activations": decoding.running}
    phases = [phase("generate", policy_weights if generating else {}, generating)]
    scoring = {"activations": max(footprint.layers.scoring_peak, footprint.head.scoring_peak)}
    phases.append(phase("score", reference, scoring | asleep))
    if trains_rm:
        memory = _activations(sizes, footprint, with_head=False) | _update(sizes, footprint, device)
        phases.append(phase("train reward model", reward_model, memory | asleep))
    memory = _activations(sizes, footprint, with_head=True) | _update(sizes, footprint, device)
    phases.append(phase("train policy", policy, memory | asleep))
    if (servers := config.rollout.sglang) is not None:
        # A rank sends no more than it has.
        bucket = min(servers.bucket_mib * 2**20, footprint.policy_parameters * sizes.element)
        buckets = {"buckets": _BUCKETS[servers.transport] * bucket}
        if _colocated(config):
            buckets |= {"served weights": served_weights(sizes, servers)} | _arriving(sizes, servers)
        phases.append(phase("reshard", policy_weights, buckets | asleep))
    written = {name: size for name, size in (policy | reward_model).items() if "gradients" not in name}
    phases.append(phase("save", written, _saving(sizes, footprint, device) | asleep))
    return phases


def _saving(sizes: Sizes, footprint: RankFootprint, device: Device) -> dict[str, int]:
    """On the device, beside what is saved. The distributed optimizer's pieces are gathered, a bucket at a time."""
    of_models = [footprint.policy_parameters]
    if sizes.config.objective.uses_reward_model:
        of_models.append(footprint.reward_model_parameters)
    split = sizes.config.parallel.distributed_optimizer
    gathering = int(4 * _gathered_bucket(sizes, of_models[-1]) * (1 + 1 / sizes.replicas)) if split else 0
    if device.flops is not None:
        return {"gathered bucket": gathering}
    # On a CPU that is host memory. What is part of a larger tensor is copied, by the rank that writes it.
    gathered = sum(of_models) * sizes.optimizer_whole if split else 0
    parts = sum(of_models) if split else len(of_models) * footprint.gated_parameters
    copied = parts * (sizes.element + sizes.optimizer_whole) // sizes.replicas
    return {"gathered states": gathered, "copies": max(gathering, copied)}


def _gathered_bucket(sizes: Sizes, parameters: int) -> int:
    """Elements: without overlapped reduction there is one bucket."""
    if not sizes.config.parallel.overlap_grad_reduce:
        return parameters
    return min(parameters, max(_GRADIENT_BUCKET, 1_000_000 * sizes.replicas))


def _trained(model: str, parameters: int, sizes: Sizes) -> dict[str, int]:
    name = model.replace("_", " ")
    return {
        f"{name} weights": int(parameters * sizes.weight_bytes(model)),
        f"{name} gradients": parameters * 4,
        f"{name} optimizer": int(parameters * sizes.optimizer_element),
    }


def _activations(sizes: Sizes, footprint: RankFootprint, *, with_head: bool) -> dict[str, int]:
    """What the micro-batches in flight keep, and what the pass that is running needs besides."""
    kept = footprint.layer_kept * footprint.num_layers + footprint.outside_kept
    in_flight = micro_batches_in_flight(sizes, footprint.stage)
    running = footprint.layers.training_peak - footprint.layers.kept
    head = footprint.head if with_head else None
    if head is not None:
        running = max(running, head.training_peak)
    return {"activations": int(kept * in_flight), "running pass": running}


def micro_batches_in_flight(sizes: Sizes, stage: int) -> float:
    """Of the 1F1B schedule, or of the interleaved one, as if there were micro-batches enough."""
    p = sizes.config.parallel
    if p.virtual_pipeline == 1:
        return p.pipeline - stage
    chunks = 2 * (p.pipeline - stage - 1) + (p.virtual_pipeline - 1) * p.pipeline + 1
    return chunks / p.virtual_pipeline


def _update(sizes: Sizes, footprint: RankFootprint, device: Device) -> dict[str, int]:
    """Torch's AdamW works on temporaries: of the largest parameter on a CPU, of all at once on CUDA.

    Transformer Engine's fused Adam has none.
    """
    if sizes.config.model.implementation == "transformer_engine":
        return {}
    if device.flops is None:
        return {"update": 2 * 4 * footprint.largest_parameter}
    return {"update": int(footprint.policy_parameters * sizes.optimizer_element / 3)}


def decoded_batch(config: TrainConfig) -> DecodedBatch:
    """Of generation on the trainer's own model; prompts all different, as in an evaluation."""
    return DecodedBatch(
        num_sequences=min(config.rollout.batch_size, rollouts_per_step(config)),
        prompt_tokens=config.prompt.max_prompt_tokens,
        new_tokens=config.rollout.sampling.max_new_tokens,
    )


def _kv_split(sizes: Sizes, tensor: int) -> int:
    """Ways that the KV heads are split over tensor ranks; with more ranks than heads they are repeated."""
    return min(tensor, sizes.geometry.num_query_groups)


def served_weights(sizes: Sizes, servers: SGLangConfig) -> int:
    """Bytes of a server's weights on one of its devices: bf16, and in FP8 one a weight of linear layers."""
    linear = sizes.geometry.num_layers * linear_parameters(sizes.geometry) if servers.dtype == "fp8" else 0
    return (2 * num_parameters(sizes.geometry) - linear) // servers.tensor


def _arriving(sizes: Sizes, servers: SGLangConfig) -> dict[str, int]:
    """What a server holds in a publication besides: of FP8 weights copies in bf16, until they are whole."""
    if servers.dtype != "fp8":
        return {}
    return {"weights that arrive": 2 * sizes.geometry.num_layers * linear_parameters(sizes.geometry) // servers.tensor}


def _kv_cache(
    sizes: Sizes, footprints: Sequence[RankFootprint], device: Device, phases: Sequence[PhaseMemory]
) -> tuple[KvCache, Sequence[PhaseMemory]]:
    """Also what a server has on its device in each phase, where the device is its own."""
    config, servers = sizes.config, sizes.config.rollout.sglang
    limit = config.model.max_sequence_length
    if servers is None:
        batch = decoded_batch(config)
        return KvCache(
            where="trainer rank",
            num_holders=sizes.data,
            tokens=batch.num_sequences * (batch.prompt_tokens + batch.new_tokens),
            sequences_at_limit=batch.num_sequences,
            bytes_per_token=sizes.kv_bytes_per_token // _kv_split(sizes, config.parallel.tensor),
        ), ()
    weights = served_weights(sizes, servers)
    allowed, shared = int(servers.memory_share * device.memory), None
    if _colocated(config):
        resident = max(memory.total for memory in phases if memory.phase == "generate")
        left = int(FULL * device.memory) - resident - device.server_workspace
        if servers.device == "cuda":
            shared = SharedDevice(servers.memory_share, left / device.memory)
        allowed = min(allowed, left)
    per_token = 2 * sizes.kv_bytes_per_token // sizes.element // _kv_split(sizes, servers.tensor)
    tokens = max(allowed - weights, 0) // per_token
    if (most := servers.arguments.get("max-total-tokens")) is not None:
        tokens = min(tokens, int(most))
    parts = {"served weights": weights, "KV cache": tokens * per_token, "workspace": device.server_workspace}
    kv_cache = KvCache(
        where="server",
        num_holders=servers.num_servers,
        tokens=tokens,
        sequences_at_limit=tokens // limit,
        bytes_per_token=per_token,
        shared=shared,
    )
    if _colocated(config):
        return kv_cache, ()  # the pool takes what it may: counted as used it would say nothing
    arriving = _arriving(sizes, servers)
    memories = [PhaseMemory("server", "generate", parts)]
    return kv_cache, [*memories, PhaseMemory("server", "reshard", parts | arriving)] if arriving else memories


def _host_bytes(sizes: Sizes, footprints: Sequence[RankFootprint]) -> int:
    """A process's: what it writes of a checkpoint, of the distributed optimizer all that the replicas hold together;
    with offload also what is off the device, at most all of it.
    """
    per_stage = []
    for footprint in footprints:
        trained = _trained("policy", footprint.policy_parameters, sizes)
        parameters = footprint.policy_parameters
        if sizes.config.objective.uses_reward_model:
            trained |= _trained("reward_model", footprint.reward_model_parameters, sizes)
            parameters += footprint.reward_model_parameters
        checkpoint = parameters * (sizes.element + sizes.optimizer_whole)
        away = sum(trained.values()) if sizes.config.parallel.offload else 0
        per_stage.append(checkpoint + away)
    return max(per_stage)


def _colocated(config: TrainConfig) -> bool:
    return config.rollout.sglang is not None and config.rollout.sglang.placement == "colocated"


def amount(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"
