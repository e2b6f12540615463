"""Plans as tables on a console."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from oreal_megatron.planner.hardware import (
    COPY_SHARE,
    DECODING_LATENCY,
    DECODING_SHARE,
    LINK_SHARE,
    MATRIX_SHARE,
    RESHARD_PAUSE,
    SCORING_SHARE,
    STORAGE_PER_NODE,
    TRAINING_SHARE,
    device_named,
)
from oreal_megatron.planner.memory import PHASES, MemoryPlan, amount, micro_batches_in_flight
from oreal_megatron.planner.planner import Plan
from oreal_megatron.planner.schedules import LENGTH_SIGMA
from oreal_megatron.planner.sizes import num_parameters
from oreal_megatron.planner.step_time import Measured

_COLOURS = {"fits": "green", "tight": "yellow", "does not fit": "red"}


def print_plan(console: Console, plan: Plan, measured: Measured | None = None) -> None:
    """Prints all estimates of a plan, and whether the run fits."""
    _print_layout(console, plan)
    _print_memory(console, plan.memory)
    _print_generation(console, plan)
    _print_seconds(console, plan, measured)
    _print_disk(console, plan)
    memory = plan.memory
    colour = _COLOURS[memory.verdict]
    console.print(
        f"\n[bold {colour}]{memory.verdict}[/]: {memory.share:.0%} of {memory.device.name}'s memory at most "
        f"({memory.worst.where}, {memory.worst.phase})"
    )
    for problem in memory.problems:
        console.print(f"  [red]{escape(problem)}[/]")


def layout_text(plan: Plan) -> str:
    """Returns the layout in one line, such as `TP8, PP2, DP8, recompute full`."""
    p = plan.sizes.config.parallel
    parts = [f"TP{p.tensor}", f"PP{p.pipeline}"]
    parts += [f"VPP{p.virtual_pipeline}"] if p.virtual_pipeline > 1 else []
    parts += [f"CP{p.context}"] if p.context > 1 else []
    parts += [f"DP{plan.sizes.data}", f"recompute {p.recompute}"]
    parts += [
        text
        for text, is_on in (
            ("sequence parallel", p.sequence),
            ("distributed optimizer", p.distributed_optimizer),
            ("offload", p.offload),
        )
        if is_on
    ]
    return ", ".join(parts)


def _print_layout(console: Console, plan: Plan) -> None:
    config, sizes = plan.sizes.config, plan.sizes
    servers = config.rollout.sglang if config.generates else None
    console.print(
        f"[bold]{escape(config.run.name)}[/]: {sizes.num_devices} trainer processes on {plan.memory.device.name}"
    )
    console.print(f"  layout    {layout_text(plan)}")
    if servers is not None:
        of_evaluation = f", {number} for evaluation alone" if (number := config.evaluation.servers) else ""
        console.print(f"  servers   {servers.total_servers} x TP{servers.tensor}, {servers.placement}{of_evaluation}")
    counts = ", ".join(
        f"stage {f.stage}: {f.num_layers} layers, {f.policy_parameters / 1e6:,.1f}M" for f in plan.footprints
    )
    console.print(f"  model     {num_parameters(sizes.geometry) / 1e9:.2f}B parameters; on a rank: {counts}")
    in_flight = ", ".join(f"{micro_batches_in_flight(sizes, f.stage):g}" for f in plan.footprints)
    console.print(f"  in flight {in_flight} micro-batches")


def _print_memory(console: Console, memory: MemoryPlan) -> None:
    unit, size_of_unit = ("GiB", 2**30) if memory.worst.total >= 2**30 else ("MiB", 2**20)
    table = Table(title=f"{unit} of a device by phase, on the fullest stage", title_justify="left")
    for column in ("phase", "where", "total", "parts"):
        table.add_column(column, justify="right" if column == "total" else "left")
    for phase in PHASES:
        for fullest in _fullest_by_kind([m for m in memory.phases if m.phase == phase]):
            largest = sorted(fullest.parts.items(), key=lambda item: -item[1])
            parts = ", ".join(
                f"{name} {size / size_of_unit:.1f}" for name, size in largest if size >= 0.01 * fullest.total
            )
            table.add_row(phase, fullest.where, f"{fullest.total / size_of_unit:.1f}", parts)
    console.print(table)
    console.print(f"host memory of a node: at most {amount(memory.host_bytes_per_node)}, while a checkpoint is written")


def _fullest_by_kind(phases: Sequence) -> list:  # type: ignore[type-arg]
    trainers = [m for m in phases if m.where != "server"]
    servers = [m for m in phases if m.where == "server"]
    return [max(group, key=lambda m: m.total) for group in (trainers, servers) if group]


def _print_generation(console: Console, plan: Plan) -> None:
    kv, limit = plan.memory.kv_cache, plan.sizes.config.model.max_sequence_length
    if kv is None:
        return
    in_a_step = f"; {plan.work.rollouts / kv.num_holders:.0f} rollouts each in a step" if plan.work.rollouts else ""
    console.print(
        f"KV cache: {kv.num_holders} x {kv.where}, {kv.tokens:,} tokens each at {kv.bytes_per_token / 1024:.0f} KiB "
        f"per token and device; {kv.sequences_at_limit} sequences of {limit:,} tokens at once, about "
        f"{int(kv.tokens / plan.work.mean_tokens)} of the mean length{in_a_step}"
    )


def _print_seconds(console: Console, plan: Plan, measured: Measured | None) -> None:
    work = plan.work
    on_average = f"of {work.mean_response_tokens:,.0f} tokens on average ({work.source})"
    if plan.sizes.config.is_sft:
        console.print(f"a step: {work.trained_sequences} conversations {on_average}")
    else:
        console.print(f"a step: {work.rollouts} rollouts {on_average}, {work.trained_sequences} trained at most")
    if plan.seconds is not None:
        table = Table(title="seconds of a step from the device's figures", title_justify="left")
        table.add_column("phase")
        table.add_column("s", justify="right")
        for name, value in plan.seconds.items():
            table.add_row(name, f"{value:,.1f}")
        table.add_row("total", f"{plan.step_seconds:,.0f}")
        console.print(table)
        _print_schedules(console, plan)
        console.print("the figures behind them:")
        for line in sources(plan):
            console.print(f"  {escape(line)}")
    elif plan.figures is not None:
        console.print("seconds: no link between devices is measured. Run oreal-doctor --measure on several devices.")
    elif measured is None:
        console.print(
            "seconds: the speed of this device is unknown. Name with --measured a run on it, or a file that "
            "oreal-doctor --measure has written on it."
        )
    if measured is not None:
        medians = ", ".join(f"{name} {value:.1f}" for name, value in measured.seconds.items())
        console.print(f"measured, medians of {measured.num_steps} steps: {medians}")


def _print_schedules(console: Console, plan: Plan) -> None:
    schedules = plan.schedules()
    if not schedules:
        return
    lengths = (
        "measured lengths" if plan.work.response_lengths else f"log-normal lengths, sigma {LENGTH_SIGMA} (assumed)"
    )
    table = Table(title=f"a step by rollout.schedule, simulated with {lengths}", title_justify="left")
    for column in ("schedule", "in_flight"):
        table.add_column(column)
    for column in ("max_staleness", "s", "speed-up", "servers idle", "mean staleness"):
        table.add_column(column, justify="right")
    for row in schedules:
        table.add_row(
            row.schedule,
            ("keep_cache" if row.keep_cache else "recompute") if row.schedule == "continuous" else "",
            str(row.max_staleness),
            f"{row.step_seconds:,.0f}",
            f"{schedules[0].step_seconds / row.step_seconds:.2f}",
            f"{row.idle_share:.0%}",
            f"{row.mean_staleness:.1f}",
        )
    console.print(table)


def sources(plan: Plan) -> list[str]:
    """Returns a line for each figure that the seconds rest on, with its source: data sheet, measured or assumed."""
    figures, device, servers = plan.figures, plan.memory.device, plan.sizes.config.rollout.sglang
    assert device.flops is not None and device.bandwidth is not None
    sheet = f"the {device.name}'s data sheet"
    source, product, copy = (sheet, 1.0, 1.0) if figures is None else ("measured", MATRIX_SHARE, COPY_SHARE)
    training, scoring, decoding = TRAINING_SHARE / product, SCORING_SHARE / product, DECODING_SHARE / copy
    flops, bandwidth = device.flops * product / 1e12, device.bandwidth * copy / 1e12
    if plan.sizes.config.is_sft:
        return [f"arithmetic   {flops:,.3g} TFLOP/s ({source}): training {training:.0%} (assumed)"]
    lines = [
        f"arithmetic   {flops:,.3g} TFLOP/s ({source}): training {training:.0%}, scoring {scoring:.0%} (assumed)",
        f"reading      {bandwidth:,.3g} TB/s ({source}): decoding {decoding:.0%} (assumed)",
    ]
    if servers is not None and figures is not None and (server := figures.server) is not None:
        times = ", ".join(f"{1e3 * t:.3g} ms at {n}" for n, t in sorted(server.token_seconds.items()))
        lines.append(
            f"a token      {times} responses at once (measured); KV cache beyond {server.context_tokens} tokens is read"
        )
    else:
        lines.append(
            f"a token      weights and KV cache are read, and {1e6 * DECODING_LATENCY:.0f} us a layer (assumed)"
        )
    if servers is not None and device.link is not None:
        link = f"{device.link * 8 / 1e9:,.3g} Gb/s ({sheet}): {LINK_SHARE:.0%} (assumed)"
        if figures is not None and device.link != device_named(figures.device, sharing=1).link:
            where = "within a node" if figures.link_bytes_per_second is None else "between nodes"
            link = f"{LINK_SHARE * device.link * 8 / 1e9:,.3g} Gb/s {where} (measured)"
        lines.append(f"publication  {link}, and {RESHARD_PAUSE:g} s of pause (assumed)")
    return lines


def _print_disk(console: Console, plan: Plan) -> None:
    d, run = plan.disk, plan.sizes.config.run
    console.print(
        f"disk: {amount(d.checkpoint)} for a checkpoint ({d.seconds_to_save:.0f} s to write at "
        f"{STORAGE_PER_NODE / 1e9:.0f} GB/s per node), {amount(d.checkpoints)} with run.keep_checkpoints="
        f"{run.keep_checkpoints}, the best and the one being written; trajectories {amount(d.rollouts)}; an export to "
        f"Hugging Face {amount(d.export)}"
    )


def print_search(console: Console, plans: Sequence[Plan], limit: int = 10) -> None:
    """Prints the first `limit` plans of a search."""
    table = Table(title=f"{len(plans)} layouts fit; the fastest", title_justify="left")
    for column in ("layout", "memory", "step s"):
        table.add_column(column, justify="left" if column == "layout" else "right")
    for plan in plans[:limit]:
        seconds = "" if plan.step_seconds is None else f"{plan.step_seconds:,.0f}"
        table.add_row(layout_text(plan), f"{plan.memory.share:.0%}", seconds)
    console.print(table)


def print_splits(console: Console, plans: Sequence[Plan], budget: int) -> None:
    """Prints the plans of `splits`."""
    table = Table(title=f"{len(plans)} splits of {budget} devices fit", title_justify="left")
    for column in ("trainer devices", "servers", "memory", "step s"):
        table.add_column(column, justify="right")
    for plan in plans:
        servers = plan.sizes.config.rollout.sglang
        assert servers is not None
        seconds = "" if plan.step_seconds is None else f"{plan.step_seconds:,.0f}"
        table.add_row(
            str(plan.sizes.num_devices),
            f"{servers.num_servers} x TP{servers.tensor}",
            f"{plan.memory.share:.0%}",
            seconds,
        )
    console.print(table)
    if plans:
        best = plans[0].sizes.config
        assert best.rollout.sglang is not None
        console.print(
            f"fastest under rollout.schedule={best.rollout.schedule}: [bold]resources.trainer_devices="
            f"{best.resources.trainer_devices} rollout.sglang.num_servers={best.rollout.sglang.num_servers}[/]"
        )
