"""What `oreal-plan`, `oreal-submit` and `oreal-doctor` share: a configuration without site values, and its planner."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from oreal_megatron.compose import composed, resolved, with_placeholders
from oreal_megatron.config import GeometryConfig, TrainConfig, parse_config
from oreal_megatron.dry_run import is_dry_run, shrunk
from oreal_megatron.planner.planner import Plan, first_change, make_plan
from oreal_megatron.planner.step_time import Measured


def suggest(console: Console, planned: Plan, replan: Callable[[TrainConfig], Plan]) -> int:
    """Says what to change where it does not fit; the exit status."""
    if not planned.memory.problems:
        return 0
    with console.status("looking for what to change"):
        change = first_change(planned, replan)
    if change is None:
        console.print("no single usual change makes it fit: give it more devices, or look with oreal-plan --search")
    else:
        overrides, changed = change
        seconds = "" if changed.step_seconds is None else f", {changed.step_seconds:,.0f} s a step"
        console.print(f"change first: [bold]{overrides}[/] ({changed.memory.share:.0%} of memory{seconds})")
    return 1


def planned_config(overrides: list[str], console: Console) -> TrainConfig:
    """The configuration with placeholders for what only the site knows, which no plan depends on."""
    raw = composed(overrides)
    if is_dry_run(raw):
        raw = shrunk(raw)
    missing = with_placeholders(raw)
    own = [key for key in missing if not key.startswith("cluster.")]
    if own:
        console.print(f"[yellow]not given yet: {', '.join(own)}[/]")
    return parse_config(resolved(raw))


def num_devices(config: TrainConfig, given: int | None) -> int:
    p = config.parallel
    return given or config.resources.trainer_devices or p.tensor * p.pipeline * p.context


def planner_of(
    config: TrainConfig, *, devices: int | None = None, measured: Measured | None = None
) -> Callable[[TrainConfig], Plan]:
    """Plans variants of a configuration that share its model."""
    from oreal_megatron.models.memory_profile import MemoryProfiler
    from oreal_megatron.rollout.embedded import sample

    geometry, sampling = _geometry(config), config.rollout.sampling
    meter = MemoryProfiler(
        geometry,
        config.model,
        lambda logits: sample(logits, logits.new_zeros(1), sampling),
        on_cpu=config.resources.device == "cpu",
    )
    count = num_devices(config, devices)
    return lambda variant: make_plan(variant, geometry, meter, num_devices=count, measured=measured)


def _geometry(config: TrainConfig) -> GeometryConfig:
    geometry = config.model.geometry
    if geometry is None:
        from oreal_megatron.conversion.huggingface import geometry_of

        geometry = geometry_of(Path(str(config.model.path)))
    if geometry.vocab_size is None:
        from oreal_megatron.data.tokenizer import load_tokenizer

        geometry = geometry.model_copy(update={"vocab_size": len(load_tokenizer(config.model.tokenizer))})
    return geometry
