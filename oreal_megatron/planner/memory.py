"""Memory of every rank in every phase of a step, from measured footprints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from oreal_megatron.config import FunctionConfig, GeometryConfig, SGLangConfig, TrainConfig
from oreal_megatron.planner.footprints import DecodedBatch, RankFootprint
from oreal_megatron.planner.hardware import FULL, SURE, Device, device_named
from oreal_megatron.planner.sizes import Sizes, linear_parameters, num_parameters, rollouts_per_step

PHASES = ("generate", "score", "train reward model", "train policy", "reshard", "save")
_BUCKETS = {"direct": 1, "ipc": 3, "broadcast": 3, "disk": 0}
"""Buckets in a rank's memory during a publication, by transport: one in two halves, or two in flight and a third that
collects other ranks' parts."""
_GRADIENT_BUCKET = 40_000_000
"""Elements of Megatron-Core's gradient buckets with overlapped reduction, and at least a million for each data rank."""


@dataclass(frozen=True)
class PhaseMemory:
    """Bytes on one device in one phase, by use."""

    where: str
    """Owner of the bytes: `stage 0`, `stage 1`, ..., or `server`."""
    phase: str
    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True, kw_only=True)
class KvCache:
    """Room for sequences that are being generated."""

    where: str
    """Owner of the cache: `server` or `trainer rank`."""
    num_holders: int
    """Number of servers, or of trainer replicas."""
    tokens: int
    """Tokens that one holder has room for."""
    sequences_at_limit: int
    """Number of sequences of the longest length that fit at the same time."""
    bytes_per_token: int
    """Bytes of one token on one device."""
    memory_share: float = 0.0
    """Share of a device that a server's weights and KV cache take; 0 on a trainer rank."""
    share_left: float | None = None
    """Share of a device that the trainer leaves for them; None where they do not share a CUDA device."""


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Memory of a run: every rank in every phase, the KV cache, and host memory."""

    device: Device
    phases: Sequence[PhaseMemory]
    kv_cache: KvCache | None
    """Room for responses; None for a run that generates none."""
    host_bytes_per_node: int
    """Bytes of host memory for offloaded states and for the copy that a checkpoint is written from."""

    @property
    def worst(self) -> PhaseMemory:
        """Device and phase with the most bytes."""
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def share(self) -> float:
        """Share of the device's memory that is used at most."""
        return self.worst.total / self.device.memory

    @property
    def problems(self) -> list[str]:
        """Reasons why the run does not fit; empty where it fits."""
        found = []
        if self.share > FULL:
            found.append(
                f"{self.worst.where} needs {amount(self.worst.total)} to {self.worst.phase}, "
                f"{self.device.name} has {amount(self.device.memory)}, of which a plan may use {FULL:.0%}"
            )
        if self.kv_cache is None:
            return found
        taken, left = self.kv_cache.memory_share, self.kv_cache.share_left
        if left is not None and taken > left:
            found.append(
                f"servers take {taken:.0%} of a device on which the trainer leaves {left:.0%} while they generate. "
                f"Set rollout.sglang.memory_share={max(int(100 * left), 1) / 100}."
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
    """Returns the memory of a run.

    footprints: one for each pipeline stage.
    """
    config = sizes.config
    phases = [memory for footprint in footprints for memory in _trainer_phases(sizes, footprint, device)]
    kv_cache = None
    if config.generates:
        kv_cache, server = _kv_cache(sizes, footprints, device, phases)
        phases = [*phases, *server]
    per_node = min(config.resources.devices_per_node, sizes.num_devices)
    return MemoryPlan(
        device=device, phases=phases, kv_cache=kv_cache, host_bytes_per_node=per_node * _host_bytes(sizes, footprints)
    )


def _trainer_phases(sizes: Sizes, footprint: RankFootprint, device: Device) -> list[PhaseMemory]:
    config, where = sizes.config, f"stage {footprint.stage}"
    trains_rm = config.trains_reward_model
    policy = _trained("policy", footprint.policy_parameters, sizes)
    reward_model = _trained("reward_model", footprint.reward_model_parameters, sizes) if trains_rm else {}
    reference = {}
    if not config.is_sft:
        reference = {"reference weights": int(footprint.policy_parameters * sizes.weight_bytes("reference"))}
    policy_weights = {"policy weights": policy["policy weights"]}
    # Without offload all of it is on the device all the time; with offload only what the phase uses.
    everything = policy | reward_model | reference
    offloaded = {"offloaded servers": device.server_offloaded} if _colocated(config) else {}

    servers = config.rollout.sglang if config.generates else None
    # The copy to which the next publication is compared; it stays on the device.
    sent = footprint.policy_parameters * sizes.element if servers is not None and servers.full_every > 1 else 0

    def phase(name: str, used: Mapping[str, int], more: Mapping[str, int]) -> PhaseMemory:
        resident = used if config.parallel.offload else everything
        overhead = {"framework": device.overhead, "sent weights": sent}
        return PhaseMemory(where, name, {k: v for k, v in {**resident, **more, **overhead}.items() if v})

    # Colocated servers fill the rest of the device: whether they fit is checked by the room for their KV cache.
    generating: dict[str, int] = {}
    if footprint.decoding_cache:
        generating = {"KV cache": footprint.decoding_cache, "activations": footprint.decoding_running}
    phases = []
    if config.generates:
        phases.append(phase("generate", policy_weights if generating else {}, generating))
    if not config.is_sft:
        scoring = {"activations": max(footprint.layers.scoring_peak, footprint.head.scoring_peak)}
        phases.append(phase("score", reference, scoring | offloaded))
    if trains_rm:
        memory = _activations(sizes, footprint, with_head=False) | _update(sizes, footprint, device)
        phases.append(phase("train reward model", reward_model, memory | offloaded))
    memory = _activations(sizes, footprint, with_head=True) | _update(sizes, footprint, device)
    phases.append(phase("train policy", policy, memory | offloaded))
    if servers is not None:
        bucket = min(servers.bucket_mib * 2**20, footprint.policy_parameters * sizes.element)
        # A transport of the user's own is planned without buckets.
        number: float = 0 if isinstance(servers.transport, FunctionConfig) else _BUCKETS[servers.transport]
        # Halves: earlier weights, places of changes and their gaps, the mask of changes, and two messages of a quarter.
        number += 1.5 if servers.full_every > 1 else 0
        buckets = {"buckets": int(number * bucket)}
        if _colocated(config):
            buckets |= {"served weights": served_weights(sizes, servers)} | _arriving(sizes, servers)
        phases.append(phase("reshard", policy_weights, buckets | offloaded))
    written = {name: size for name, size in (policy | reward_model).items() if "gradients" not in name}
    phases.append(phase("save", written, _saving(sizes, footprint, device) | offloaded))
    return phases


def _saving(sizes: Sizes, footprint: RankFootprint, device: Device) -> dict[str, int]:
    """Returns the bytes on the device while states are saved, besides the states.

    Shards of the distributed optimizer are gathered, one bucket at a time.
    """
    of_models = [footprint.policy_parameters]
    if sizes.config.trains_reward_model:
        of_models.append(footprint.reward_model_parameters)
    split = sizes.config.parallel.distributed_optimizer
    gathering = int(4 * _gathered_bucket(sizes, of_models[-1]) * (1 + 1 / sizes.replicas)) if split else 0
    if device.flops is not None:
        return {"gathered bucket": gathering}
    # On a CPU the device is host memory. Parts of larger tensors are copied by the rank that writes them.
    gathered = sum(of_models) * sizes.optimizer_whole if split else 0
    parts = sum(of_models) if split else len(of_models) * footprint.gated_parameters
    copied = parts * (sizes.element + sizes.optimizer_whole) // sizes.replicas
    return {"gathered states": gathered, "copies": max(gathering, copied)}


def _gathered_bucket(sizes: Sizes, parameters: int) -> int:
    """Returns the elements of a gradient bucket. Without overlapped reduction there is one bucket."""
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
    """Returns the bytes that micro-batches in flight keep, and the further bytes of the running pass."""
    kept = footprint.layer_kept * footprint.num_layers + footprint.outside_kept
    in_flight = micro_batches_in_flight(sizes, footprint.stage)
    running = footprint.layers.training_peak - footprint.layers.kept
    head = footprint.head if with_head else None
    if head is not None:
        running = max(running, head.training_peak)
    return {"activations": int(kept * in_flight), "running pass": running}


def micro_batches_in_flight(sizes: Sizes, stage: int) -> float:
    """Returns the micro-batches that a stage keeps activations of, under the 1F1B or the interleaved schedule.

    Assumes that a step has at least as many micro-batches.
    """
    p = sizes.config.parallel
    if p.virtual_pipeline == 1:
        return p.pipeline - stage
    chunks = 2 * (p.pipeline - stage - 1) + (p.virtual_pipeline - 1) * p.pipeline + 1
    return chunks / p.virtual_pipeline


def _update(sizes: Sizes, footprint: RankFootprint, device: Device) -> dict[str, int]:
    """Returns the bytes of an optimizer update's temporaries.

    torch's AdamW has them for the largest parameter on a CPU, and for all parameters at once on CUDA. Transformer
    Engine's fused Adam has none.
    """
    if sizes.config.model.implementation == "transformer_engine":
        return {}
    if device.flops is None:
        return {"update": 2 * 4 * footprint.largest_parameter}
    return {"update": int(footprint.policy_parameters * sizes.optimizer_element / 3)}


def decoded_batch(config: TrainConfig) -> DecodedBatch:
    """Returns the largest batch that the trainer's own model generates, with all prompts different."""
    largest = config.rollout.batch_size
    return DecodedBatch(
        num_sequences=largest if config.is_sft else min(largest, rollouts_per_step(config)),
        prompt_tokens=config.prompt.max_prompt_tokens,
        new_tokens=config.rollout.sampling.max_new_tokens,
    )


def _kv_split(sizes: Sizes, tensor: int) -> int:
    """Returns over how many tensor ranks the key-value heads are split. Further ranks hold copies."""
    return min(tensor, sizes.geometry.num_query_groups)


def served_weights(sizes: Sizes, servers: SGLangConfig) -> int:
    """Returns the bytes of a server's weights on one of its devices: 2 for each, or 1 in linear layers in FP8."""
    linear = sizes.geometry.num_layers * linear_parameters(sizes.geometry) if servers.dtype == "fp8" else 0
    return (2 * num_parameters(sizes.geometry) - linear) // servers.tensor


def _arriving(sizes: Sizes, servers: SGLangConfig) -> dict[str, int]:
    """Returns the further bytes of a server in a publication: bf16 copies of FP8 weights until they are complete."""
    if servers.dtype != "fp8":
        return {}
    return {"arriving weights": 2 * sizes.geometry.num_layers * linear_parameters(sizes.geometry) // servers.tensor}


def _kv_cache(
    sizes: Sizes, footprints: Sequence[RankFootprint], device: Device, phases: Sequence[PhaseMemory]
) -> tuple[KvCache, Sequence[PhaseMemory]]:
    """Returns the KV cache, and the memory of a server's device by phase where servers have their own devices."""
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
    allowed, share_left = int(servers.memory_share * device.memory), None
    if _colocated(config):
        resident = max(memory.total for memory in phases if memory.phase == "generate")
        left = int(FULL * device.memory) - resident - device.server_workspace
        if servers.shares_gpus:
            share_left = left / device.memory
        allowed = min(allowed, left)
    tokens, per_token = _served_tokens(sizes, servers, allowed)
    parts = {"served weights": weights, "KV cache": tokens * per_token, "workspace": device.server_workspace}
    kv_cache = KvCache(
        where="server",
        num_holders=servers.total_servers - config.evaluation.servers,
        tokens=tokens,
        sequences_at_limit=tokens // limit,
        bytes_per_token=per_token,
        memory_share=servers.memory_share,
        share_left=share_left,
    )
    if _colocated(config):
        return kv_cache, ()  # the KV cache fills the device, so its use says nothing
    arriving = _arriving(sizes, servers)
    memories = [PhaseMemory("server", "generate", parts)]
    return kv_cache, [*memories, PhaseMemory("server", "reshard", parts | arriving)] if arriving else memories


def _served_tokens(sizes: Sizes, servers: SGLangConfig, allowed: int) -> tuple[int, int]:
    """Returns the tokens of a server's KV cache and the bytes of each on one device.

    allowed: bytes for weights and KV cache on one of its devices.
    """
    per_token = 2 * sizes.kv_bytes_per_token // sizes.element // _kv_split(sizes, servers.tensor)
    tokens = max(allowed - served_weights(sizes, servers), 0) // per_token
    if (most := servers.arguments.get("max-total-tokens")) is not None:
        tokens = min(tokens, int(most))
    return tokens, per_token


def tokens_beside_trainer(config: TrainConfig, servers: SGLangConfig, geometry: GeometryConfig) -> int:
    """Returns the tokens of the KV cache of a server on the trainer's GPUs.

    SGLang itself takes a share of the memory that is free when it starts, which depends on what the trainer holds then.
    A number of tokens is the same at every start. geometry: with vocab_size.
    """
    allowed = int(servers.memory_share * device_named(config.resources.device, sharing=1).memory)
    return _served_tokens(Sizes(config, geometry, num_devices=1), servers, allowed)[0]


def _host_bytes(sizes: Sizes, footprints: Sequence[RankFootprint]) -> int:
    """Returns the most host memory of one process: its part of a checkpoint and, with offload, all offloaded states.

    With the distributed optimizer one process writes the states of all replicas.
    """
    per_stage = []
    for footprint in footprints:
        trained = _trained("policy", footprint.policy_parameters, sizes)
        parameters = footprint.policy_parameters
        if sizes.config.trains_reward_model:
            trained |= _trained("reward_model", footprint.reward_model_parameters, sizes)
            parameters += footprint.reward_model_parameters
        checkpoint = parameters * (sizes.element + sizes.optimizer_whole)
        offloaded = sum(trained.values()) if sizes.config.parallel.offload else 0
        per_stage.append(checkpoint + offloaded)
    return max(per_stage)


def _colocated(config: TrainConfig) -> bool:
    servers = config.rollout.sglang
    return servers is not None and servers.placement == "colocated" and config.generates


def amount(size: float) -> str:
    """Returns a number of bytes as text, in GiB or MiB."""
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"
