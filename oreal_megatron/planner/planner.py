"""Plans of a configuration: memory, step time, disk, and the first change that makes a run fit."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from oreal_megatron.config import ConfigError, GeometryConfig, ParallelConfig, TrainConfig, Violation, check_layout
from oreal_megatron.planner.figures import Figures
from oreal_megatron.planner.footprints import DecodedBatch, RankFootprint
from oreal_megatron.planner.hardware import device_named, with_figures
from oreal_megatron.planner.memory import MemoryPlan, decoded_batch, memory_plan
from oreal_megatron.planner.schedules import Setting, Simulated, simulate
from oreal_megatron.planner.sizes import Sizes, row_tokens
from oreal_megatron.planner.step_time import Decoding, Disk, Measured, Workload, assumed_workload, disk, phase_seconds

Profile = Callable[[ParallelConfig, int, DecodedBatch | None], list[RankFootprint]]
"""Type of models.memory_profile.MemoryProfiler.stages, an argument because this package imports no torch."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Estimates of a run with one layout."""

    sizes: Sizes
    footprints: Sequence[RankFootprint]
    memory: MemoryPlan
    work: Workload
    seconds: Mapping[str, float] | None
    """Seconds of a step by phase, from the device's figures; None if these are unknown."""
    disk: Disk
    figures: Figures | None = None
    """Measured figures that replaced those of the data sheet."""

    @functools.cached_property
    def step_seconds(self) -> float | None:
        """Seconds of a step under the configured `rollout.schedule`."""
        if self.seconds is None:
            return None
        rollout = self.sizes.config.rollout
        if rollout.schedule == "in_turn":
            return sum(self.seconds.values())
        return simulate(self.setting(), rollout.schedule, rollout.staleness_bound).step_seconds

    def setting(self) -> Setting:
        """Returns what the simulation of schedules needs, of servers on devices of their own."""
        kv_cache, seconds = self.memory.kv_cache, self.seconds
        assert kv_cache is not None and seconds is not None
        decoding = Decoding(
            sizes=self.sizes,
            device=self.memory.device,
            kv_cache=kv_cache,
            work=self.work,
            measured=self.figures.server if self.figures else None,
        )
        return replace(
            decoding.setting(),
            train_seconds=sum(value for name, value in seconds.items() if name not in ("generate", "reshard")),
            publish_seconds=seconds["reshard"],
            keep_cache=self.sizes.config.rollout.in_flight == "keep_cache",
        )

    def schedules(self) -> list[Simulated]:
        """Simulates every `rollout.schedule`, and `continuous` with both values of `rollout.in_flight`.

        Returns an empty list where servers cannot generate while the trainer works.
        """
        config = self.sizes.config
        servers = config.rollout.sglang if config.generates else None
        if self.seconds is None or servers is None or servers.shares_devices or config.rollout.long_tail is not None:
            return []
        setting, bound = self.setting(), max(config.rollout.staleness_bound, 2)
        again, kept = (replace(setting, keep_cache=keep_cache) for keep_cache in (False, True))
        return [
            simulate(again, "in_turn", 0),
            simulate(again, "one_ahead", 1),
            *(simulate(way, "continuous", staleness) for staleness in sorted({1, bound}) for way in (again, kept)),
        ]


def make_plan(
    config: TrainConfig,
    geometry: GeometryConfig,
    profile: Profile,
    *,
    num_devices: int,
    measured: Measured | None = None,
    figures: Figures | None = None,
) -> Plan:
    """Plans a configuration.

    num_devices: number of trainer processes.
    measured: metrics of a run, whose response lengths replace the assumed ones.
    figures: measured figures of the devices, which replace those of the data sheet.

    Raises:
        ConfigError: the layout does not divide the model.
        ValueError: Megatron-Core does not support the layout.
    """
    check_layout(geometry, config.parallel, config.rollout.sglang)
    sizes = Sizes(config, geometry, num_devices)
    device = device_named(config.resources.device, sharing=num_devices)
    if figures is not None:
        device = with_figures(device, figures)
    is_embedded = config.rollout.backend == "embedded" and config.generates
    batch = decoded_batch(config) if is_embedded else None
    footprints = profile(config.parallel, row_tokens(config), batch)
    memory = memory_plan(sizes, footprints, device)
    work = assumed_workload(config, measured.mean_response_tokens if measured else None)
    if measured is not None:
        work = replace(work, response_lengths=measured.response_lengths)
    return Plan(
        sizes=sizes,
        footprints=footprints,
        memory=memory,
        work=work,
        seconds=phase_seconds(sizes, device, memory.kv_cache, work, figures.server if figures else None),
        disk=disk(sizes, work),
        figures=figures,
    )


def first_change(plan: Plan, replan: Callable[[TrainConfig], Plan]) -> tuple[str, Plan] | None:
    """Returns the cheapest usual change that makes the run fit, as overrides with their plan; None if there is none."""
    parallel = plan.sizes.config.parallel
    for changes in _changes(parallel, plan.sizes.geometry):
        config = plan.sizes.config.model_copy(update={"parallel": parallel.model_copy(update=changes)})
        replica = config.parallel.tensor * config.parallel.pipeline * config.parallel.context
        if plan.sizes.num_devices % replica:
            continue
        try:
            changed = replan(config)
        except (ConfigError, ValueError):
            continue
        if not changed.memory.problems:
            return " ".join(f"parallel.{key}={str(value).lower()}" for key, value in changes.items()), changed
    return None


def _changes(p: ParallelConfig, geometry: GeometryConfig) -> Iterator[dict[str, object]]:
    """Yields changes of the layout from the cheapest to the costliest, each with the free changes before it."""
    free: dict[str, object] = {}
    if not p.distributed_optimizer:
        free["distributed_optimizer"] = True
        yield dict(free)
    if not p.sequence and p.tensor > 1:
        free["sequence"] = True
        yield dict(free)
    if p.recompute == "none":
        yield {**free, "recompute": "selective"}
    if p.recompute != "full":
        free["recompute"] = "full"
        yield dict(free)
    if not p.offload:
        yield {**free, "offload": True}
    for tensor in (2 * p.tensor, 4 * p.tensor, 8 * p.tensor):
        if tensor <= 8 and geometry.num_attention_heads % tensor == 0:
            yield {**free, "tensor": tensor, "sequence": True}
    for pipeline in (2 * p.pipeline, 4 * p.pipeline):
        yield {**free, "pipeline": pipeline}
        yield {**free, "pipeline": pipeline, "offload": True}
    yield {**free, "context": 2 * p.context, "offload": True}


def search(
    config: TrainConfig, replan: Callable[[TrainConfig], Plan], num_devices: int, advance: Callable[[int, int], None]
) -> list[Plan]:
    """Returns the plans of all layouts that fit on the same devices, fastest step first.

    advance: called with the number of layouts planned so far and the number of all layouts.
    """
    candidates = list(_layouts(config, num_devices))
    found: list[tuple[float, Plan]] = []
    for index, parallel in enumerate(candidates):
        advance(index, len(candidates))
        try:
            plan = replan(config.model_copy(update={"parallel": parallel}))
        except (ConfigError, ValueError):
            continue
        if not plan.memory.problems:
            found.append((plan.step_seconds or 0.0, plan))
    # Among equally fast plans, those with more free memory come first.
    return [plan for _, plan in sorted(found, key=lambda pair: (round(pair[0]), pair[1].memory.share))]


def splits(
    config: TrainConfig, replan: Callable[[TrainConfig], Plan], budget: int, advance: Callable[[int, int], None]
) -> list[Plan]:
    """Returns the plans that fit of all splits of `budget` devices between trainer and servers, fastest step first.

    The layout of a replica and of a server stay. Of several nodes, each is a trainer's or the servers'. advance: called
    with the number of splits planned so far and the number of all splits.

    Raises:
        ConfigError: the servers have no devices of their own.
    """
    servers, per_node = config.rollout.sglang, config.resources.devices_per_node
    if servers is None or servers.shares_devices or servers.urls:
        remedy = "--budget splits devices between trainer and servers. Set rollout=sglang_disaggregated."
        raise ConfigError([Violation("rollout", config.rollout.backend, remedy)])
    unit = math.lcm(per_node, servers.tensor) if budget > per_node else servers.tensor
    p = config.parallel
    replica = p.tensor * p.pipeline * p.context
    fewest = (config.evaluation.servers + 1) * servers.tensor
    serving = [
        devices for devices in range(unit, budget, unit) if (budget - devices) % replica == 0 and devices >= fewest
    ]
    found: list[tuple[float, Plan]] = []
    for index, devices in enumerate(serving):
        advance(index, len(serving))
        resources = config.resources.model_copy(update={"trainer_devices": budget - devices})
        sglang = servers.model_copy(update={"num_servers": devices // servers.tensor})
        rollout = config.rollout.model_copy(update={"sglang": sglang})
        try:
            plan = replan(config.model_copy(update={"resources": resources, "rollout": rollout}))
        except (ConfigError, ValueError):
            continue
        if not plan.memory.problems:
            found.append((plan.step_seconds or 0.0, plan))
    return [plan for _, plan in sorted(found, key=lambda pair: pair[0])]


def _layouts(config: TrainConfig, num_devices: int) -> Iterator[ParallelConfig]:
    p = config.parallel
    most = min(8, config.resources.devices_per_node)
    for tensor in (t for t in (1, 2, 4, 8) if t <= most):
        for pipeline in (1, 2, 4, 8):
            for context in (1, 2):
                replica = tensor * pipeline * context
                if num_devices % replica:
                    continue
                for recompute in ("none", "selective", "full"):
                    yield p.model_copy(
                        update={
                            "tensor": tensor,
                            "pipeline": pipeline,
                            "context": context,
                            "virtual_pipeline": 1,
                            "sequence": tensor > 1,
                            "distributed_optimizer": num_devices > replica,
                            "recompute": recompute,
                        }
                    )
