"""Configuration without site values and its planner, for `oreal-plan`, `oreal-submit` and `oreal-doctor`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from oreal_megatron.compose import PLACEHOLDERS, SITE, composed, resolved, with_missing_values, with_placeholders
from oreal_megatron.config import ConfigError, GeometryConfig, TrainConfig, Violation, parse_config
from oreal_megatron.distributed.environment import devices_hidden
from oreal_megatron.dry_run import is_dry_run, shrunk
from oreal_megatron.log import quiet_libraries
from oreal_megatron.planner.figures import read_figures
from oreal_megatron.planner.planner import Plan, first_change, make_plan
from oreal_megatron.planner.step_time import Measured


def suggest(console: Console, planned: Plan, replan: Callable[[TrainConfig], Plan]) -> int:
    """Prints the first change that makes the plan fit. Returns the exit status: 0 where it fits as it is."""
    if not planned.memory.problems:
        return 0
    with console.status("searching for a change that makes it fit"):
        change = first_change(planned, replan)
    if change is None:
        console.print("No single usual change makes it fit. Use more devices, or try oreal-plan --search.")
    else:
        overrides, changed = change
        seconds = "" if changed.step_seconds is None else f", {changed.step_seconds:,.0f} s a step"
        console.print(f"change first: [bold]{escape(overrides)}[/] ({changed.memory.share:.0%} of memory{seconds})")
    return 1


def planned_config(overrides: list[str], console: Console, *, config_dir: Path | None) -> TrainConfig:
    """Returns the configuration with placeholders for values of the site, which no plan depends on.

    config_dir: a directory with more options of groups, as for `oreal-train --config-dir`.

    Raises:
        ConfigError: with all violations.
    """
    raw = composed(overrides, config_dir=config_dir)
    if is_dry_run(raw):
        raw = shrunk(raw)
    missing = with_placeholders(raw)
    try:
        config = parse_config(resolved(raw))
    except ConfigError as error:
        raise ConfigError(with_missing_values(error.violations)) from error
    own = [key for key in missing if not key.startswith(f"{SITE}.")]
    if own:
        console.print(f"[yellow]without values yet: {escape(', '.join(own))}[/]")
    return config


def num_devices(config: TrainConfig, given: int | None) -> int:
    """Returns the number of trainer processes: as given, as configured, or one model replica."""
    p = config.parallel
    return given or config.resources.trainer_devices or p.tensor * p.pipeline * p.context


def planner_of(
    config: TrainConfig, *, devices: int | None = None, measured: Measured | None = None, figures: Path | None = None
) -> Callable[[TrainConfig], Plan]:
    """Returns a function that plans variants of a configuration with the same model.

    devices: number of trainer processes; None: that of each variant.

    A plan needs no device, and is made on the CPU whatever the machine has: fake tensors on two devices do not mix.
    measured: metrics of a run. figures: file of `oreal-doctor --measure`.

    Raises:
        ConfigError, ValueError: see `planned_geometry` and `read_figures`.
    """
    quiet_libraries()
    with devices_hidden():
        from oreal_megatron.models.memory_profile import MemoryProfiler
        from oreal_megatron.rollout.embedded import sample

        geometry, sampling = planned_geometry(config), config.rollout.sampling
    found = None if figures is None else read_figures(figures, config, geometry)
    profiler = MemoryProfiler(
        geometry,
        config.model,
        lambda logits: sample(logits, logits.new_zeros(1), sampling),
        on_cpu=config.resources.device == "cpu",
    )

    def plan(variant: TrainConfig) -> Plan:
        count = num_devices(variant, devices)
        with devices_hidden():
            return make_plan(variant, geometry, profiler.stages, num_devices=count, measured=measured, figures=found)

    return plan


def planned_geometry(config: TrainConfig) -> GeometryConfig:
    """Returns the model's geometry with its vocabulary, from the configuration or the model's directory.

    Raises:
        ConfigError, ValueError: the directory is not given, or cannot be read.
    """
    geometry = config.model.geometry
    if geometry is None:
        from oreal_megatron.conversion.huggingface import geometry_of

        if str(config.model.path).startswith(PLACEHOLDERS):
            remedy = "A plan reads its config.json. Set it to a Hugging Face directory, or set model.geometry."
            raise ConfigError([Violation("model.path", "???", remedy)])
        geometry = geometry_of(Path(str(config.model.path)))
    if geometry.vocab_size is None:
        from oreal_megatron.data.tokenizer import load_tokenizer

        geometry = geometry.model_copy(update={"vocab_size": len(load_tokenizer(config.model.tokenizer))})
    return geometry
