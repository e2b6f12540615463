"""Seconds of each phase of a step, from the device's figures or a run's metrics, and bytes on disk."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from statistics import median

import orjson

from oreal_megatron.config import SGLangConfig, TrainConfig
from oreal_megatron.planner import hardware
from oreal_megatron.planner.figures import ServerFigures
from oreal_megatron.planner.hardware import Device
from oreal_megatron.planner.memory import KvCache, served_weights
from oreal_megatron.planner.schedules import Setting, generation_seconds, lognormal_lengths
from oreal_megatron.planner.sizes import Sizes, linear_parameters, num_parameters, rollouts_per_step


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Numbers of rollouts and tokens of a step. Supervised fine-tuning has conversations in the place of rollouts."""

    rollouts: int
    mean_prompt_tokens: float
    mean_response_tokens: float
    max_response_tokens: int
    trained_sequences: int
    source: str
    """Source of the lengths, as text."""
    response_lengths: tuple[int, ...] = ()
    """Measured lengths of responses; empty without any."""

    @property
    def mean_tokens(self) -> float:
        return self.mean_prompt_tokens + self.mean_response_tokens


def assumed_workload(config: TrainConfig, mean_response_tokens: float | None = None) -> Workload:
    """Returns the work of a step if every group is useful, which is the most work.

    mean_response_tokens: None: half of rollout.sampling.max_new_tokens; in supervised fine-tuning half of
    model.max_sequence_length, prompts included.
    """
    if config.sft is not None and config.is_sft:
        most = config.model.max_sequence_length
        return Workload(
            rollouts=0,
            mean_prompt_tokens=0,
            mean_response_tokens=mean_response_tokens or most / 2,
            max_response_tokens=most,
            trained_sequences=config.sft.batch_size,
            source="assumed: half of model.max_sequence_length" if mean_response_tokens is None else "given",
        )
    limit = config.rollout.sampling.max_new_tokens
    per_group = 2 if config.objective.selection == "pair" else config.rollout.samples_per_prompt
    return Workload(
        rollouts=rollouts_per_step(config),
        mean_prompt_tokens=min(config.prompt.max_prompt_tokens, 256),
        mean_response_tokens=mean_response_tokens or limit / 2,
        max_response_tokens=limit,
        trained_sequences=config.data.prompts_per_step * per_group,
        source="assumed: half of rollout.sampling.max_new_tokens" if mean_response_tokens is None else "given",
    )


_MEASURED_STEPS = 4
"""Steps whose trajectories are read for the lengths of responses."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Medians of a run's metrics.jsonl."""

    seconds: Mapping[str, float]
    """Seconds of a step by the trainer's phases: generate, verify, score, train, publish, total."""
    mean_response_tokens: float
    """Tokens of a response, or of a conversation in supervised fine-tuning."""
    num_steps: int
    response_lengths: tuple[int, ...] = ()
    """Tokens of the responses of the last steps; empty if the run keeps no trajectories."""


def read_measured(directory: Path) -> Measured:
    """Reads the medians of a run.

    Raises:
        ValueError: the directory has no finished step.
    """
    path = directory / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"--measured {directory}: it has no metrics.jsonl. Name the directory of a run.")
    records = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    steps = [r for r in records if r["kind"] == "step" and not r["skipped"]]
    if not steps:
        raise ValueError(f"--measured {directory}: no step has trained yet. Wait for one, or leave out --measured.")
    names = dict.fromkeys(name for step in steps for name in step["seconds"])
    return Measured(
        seconds={name: median(s["seconds"][name] for s in steps if name in s["seconds"]) for name in names},
        mean_response_tokens=median(_tokens_of_sequence(s["metrics"]) for s in steps),
        num_steps=len(steps),
        response_lengths=tuple(_response_lengths(directory / "trajectories")),
    )


def _response_lengths(directory: Path) -> Iterator[int]:
    """Yields the lengths of the responses of the last steps that wrote their trajectories whole."""
    for path in sorted(directory.glob("step_*.jsonl"))[-_MEASURED_STEPS:]:
        with path.open("rb") as file:
            for line in file:
                with contextlib.suppress(KeyError, TypeError, ValueError):  # the run may be writing the last line
                    yield len(orjson.loads(line)["response_ids"])


def _tokens_of_sequence(metrics: Mapping[str, float]) -> float:
    """Returns the mean tokens of a step's responses, or of its conversations in supervised fine-tuning."""
    if "sft/tokens" in metrics:
        return metrics["sft/tokens"] / metrics["sft/conversations"]
    return metrics["rollout/response_tokens"]


def phase_seconds(
    sizes: Sizes, device: Device, kv_cache: KvCache | None, work: Workload, measured: ServerFigures | None = None
) -> dict[str, float] | None:
    """Returns the seconds of a step by phase; None if the device's figures are unknown.

    Assumes that reward model and reference model are as large as the policy. measured: times of a token on a server.
    """
    config = sizes.config
    servers = config.rollout.sglang if config.generates else None
    is_linked = device.link is not None or servers is None
    if device.flops is None or device.bandwidth is None or not is_linked:
        return None
    # Forward passes' worth: one forward, two backward, and the recomputed part.
    again = {"none": 0.0, "selective": 0.7, "full": 1.0}[config.parallel.recompute]
    updates = config.objective.updates
    num_epochs, num_minibatches = (1, 1) if config.is_sft else (updates.epochs, updates.minibatches)
    training = _pass(
        sizes,
        device,
        work,
        "policy",
        passes=num_epochs * (3.0 + again),
        share=hardware.TRAINING_SHARE,
        num_minibatches=num_minibatches,
    )
    if num_epochs * num_minibatches > 1:  # the log-probabilities before the first update
        training += _pass(sizes, device, work, "policy", passes=1.0, share=hardware.SCORING_SHARE)
    if config.is_sft:
        return {"train policy": training} | ({"offload": _offload(sizes)} if config.parallel.offload else {})
    seconds = {}
    if kv_cache is not None:
        decoding = Decoding(sizes=sizes, device=device, kv_cache=kv_cache, work=work, measured=measured)
        seconds["generate"] = generation_seconds(decoding.setting())
    if config.objective.beta > 0:
        seconds["score"] = _pass(sizes, device, work, "reference", passes=1.0, share=hardware.SCORING_SHARE)
    if config.trains_reward_model:
        of_reward_model = config.objective.reward_model
        learns_all = of_reward_model.responses == "all"
        learned = replace(work, trained_sequences=work.rollouts) if learns_all else work
        passes = of_reward_model.updates * (3.0 + again + (of_reward_model.ranking_weight > 0))
        seconds["train reward model"] = _pass(
            sizes, device, learned, "reward_model", passes=passes, share=hardware.TRAINING_SHARE
        )
    seconds["train policy"] = training
    if config.parallel.offload:
        seconds["offload"] = _offload(sizes)
    if servers is not None:
        assert device.link is not None
        received = 2 * num_parameters(sizes.geometry) / servers.tensor
        seconds["reshard"] = received / (hardware.LINK_SHARE * device.link) + hardware.RESHARD_PAUSE
    return seconds


def _pass(
    sizes: Sizes, device: Device, work: Workload, model: str, *, passes: float, share: float, num_minibatches: int = 1
) -> float:
    """Returns the seconds of `passes` forward passes over the trained sequences, pipeline bubbles included.

    model: name in the section `fp8`. num_minibatches: parts of the sequences, each of which has bubbles of its own.
    """
    parallel = sizes.config.parallel
    tokens = work.trained_sequences * work.mean_tokens
    in_fp8 = 2 * sizes.fp8_share(model) * num_parameters(sizes.geometry)
    per_token = _product_seconds(device, flops_per_token(sizes, work.mean_tokens), in_fp8, share)
    arithmetic = tokens * per_token * passes / sizes.num_devices
    micro_batches = max(ceil(tokens / num_minibatches / sizes.data / parallel.micro_batch_tokens), 1)
    bubble = (parallel.pipeline - 1) / (parallel.virtual_pipeline * micro_batches)
    return arithmetic * (1 + bubble)


def _product_seconds(device: Device, flops: float, in_fp8: float, share: float) -> float:
    """Returns the seconds of matrix products at `share` of the device's figures.

    in_fp8: number of the `flops` that are in FP8.
    """
    assert device.flops is not None
    fast = in_fp8 / (hardware.FP8_SHARE * device.fp8_flops) if device.fp8_flops else in_fp8 / device.flops
    return (fast + (flops - in_fp8) / device.flops) / share


def flops_per_token(sizes: Sizes, length: float) -> float:
    """Returns the FLOPs of a forward pass for one token, as the mean over a causal sequence of `length` tokens.

    Two for each weight except the embedding's, and those of attention.
    """
    g = sizes.geometry
    head_dim = g.attention_head_dim
    weights = num_parameters(g) - (0 if g.tied_embeddings else (g.vocab_size or 0) * g.hidden_size)
    return 2 * weights + 2 * g.num_layers * g.num_attention_heads * head_dim * length


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """Times of generation on a server, or on a replica of the trainer.

    Decoding is limited by reading weights and KV cache. Where the time of a token is measured, reading the KV cache of
    longer sequences is added to it.
    """

    sizes: Sizes
    device: Device
    kv_cache: KvCache
    work: Workload
    measured: ServerFigures | None

    @property
    def places(self) -> float:
        """Responses of the mean length that the KV cache holds at once, at least 1."""
        return max(self.kv_cache.tokens / self.work.mean_tokens, 1.0)

    @property
    def prefill_token_seconds(self) -> float:
        """Seconds in which a token of a prompt is read."""
        return self._product_seconds(self.work.mean_prompt_tokens, hardware.SCORING_SHARE)

    def token_seconds(self, sequences: float, length: float) -> float:
        """Returns the seconds of a token of `sequences` responses at once.

        length: mean tokens of the sequences so far, prompts included.
        """
        assert self.device.bandwidth is not None
        bandwidth = hardware.DECODING_SHARE * self.device.bandwidth
        if self.measured is not None and self._servers is not None:
            longer = max(length - self.measured.context_tokens, 0.0)
            return self.measured.seconds_at(sequences) + sequences * longer * self.kv_cache.bytes_per_token / bandwidth
        weights = 2 * num_parameters(self.sizes.geometry) / self._tensor
        if self._servers is not None:
            weights = served_weights(self.sizes, self._servers)
        read = weights + sequences * length * self.kv_cache.bytes_per_token
        computed = sequences * self._product_seconds(length, hardware.SCORING_SHARE)
        return max(read / bandwidth, computed) + hardware.DECODING_LATENCY * self.sizes.geometry.num_layers

    def setting(self) -> Setting:
        """Returns the setting of a simulation in which nothing is trained."""
        work, servers = self.work, self._servers
        places = int(self.places) if servers is None else min(servers.max_concurrency, int(self.places))
        return Setting(
            num_servers=self.kv_cache.num_holders,
            places=places,
            token_seconds=self.token_seconds,
            prefill_token_seconds=self.prefill_token_seconds,
            prompt_tokens=work.mean_prompt_tokens,
            samples_per_prompt=self.sizes.config.rollout.samples_per_prompt,
            responses=work.rollouts,
            lengths=work.response_lengths
            or lognormal_lengths(work.mean_response_tokens, work.max_response_tokens, work.rollouts),
        )

    @property
    def _servers(self) -> SGLangConfig | None:
        return self.sizes.config.rollout.sglang

    @property
    def _tensor(self) -> int:
        return self._servers.tensor if self._servers else self.sizes.config.parallel.tensor

    def _product_seconds(self, length: float, share: float) -> float:
        fp8 = self._servers is not None and self._servers.dtype == "fp8"
        in_fp8 = 2 * self.sizes.geometry.num_layers * linear_parameters(self.sizes.geometry) if fp8 else 0
        return _product_seconds(self.device, flops_per_token(self.sizes, length), in_fp8, share) / self._tensor


def _offload(sizes: Sizes) -> float:
    """Returns the seconds in which trained models and reference model cross PCIe (25 GB/s) once each way."""
    parallel = sizes.config.parallel
    parameters = num_parameters(sizes.geometry) / (parallel.tensor * parallel.pipeline)
    trained = 2 if sizes.config.trains_reward_model else 1
    reference = 0 if sizes.config.is_sft else sizes.element
    return 2 * parameters * (trained * (sizes.element + sizes.optimizer_element) + reference) / 25e9


@dataclass(frozen=True, kw_only=True)
class Disk:
    """Bytes in run.dir and of an export, and seconds to save."""

    checkpoint: int
    checkpoints: int
    """Bytes of all checkpoints: those kept, the best, the one being written, and the initial policy."""
    rollouts: int
    export: int
    seconds_to_save: float


def disk(sizes: Sizes, work: Workload) -> Disk:
    """Returns the bytes that a run writes."""
    config = sizes.config
    parameters = num_parameters(sizes.geometry)
    trained = 2 if config.trains_reward_model else 1
    state = sizes.element + (12 if config.model.dtype == "bfloat16" else 8)
    checkpoint = parameters * state * trained
    initial = parameters * sizes.element
    nodes = ceil(sizes.num_devices / config.resources.devices_per_node)
    # JSON has about 20 bytes for the id and the log-probability of a token, and 4 for its text.
    per_step = work.rollouts * (work.mean_tokens * 20 + work.mean_response_tokens * 4)
    return Disk(
        checkpoint=checkpoint,
        checkpoints=checkpoint * (config.run.keep_checkpoints + 2) + initial,
        rollouts=int(config.run.num_steps * per_step) if config.tracking.trajectories else 0,
        export=2 * parameters,
        seconds_to_save=checkpoint / (nodes * hardware.STORAGE_PER_NODE),
    )
