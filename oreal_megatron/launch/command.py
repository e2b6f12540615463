"""`oreal-plan`, `oreal-submit` and `oreal-doctor`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from oreal_megatron.composition import composed, resolved, with_placeholders
from oreal_megatron.config import ConfigError, GeometryConfig, TrainConfig, parse_config
from oreal_megatron.files import write_atomically
from oreal_megatron.launch.doctor import examine
from oreal_megatron.launch.dry_run import is_dry_run, layout_mapping, shrunk
from oreal_megatron.launch.planner import Plan, first_change, make_plan, search
from oreal_megatron.launch.refusal import checked
from oreal_megatron.launch.show import show_plan, show_search
from oreal_megatron.launch.submit import allocation, rendered, submitted, tested
from oreal_megatron.launch.timing import Measured, read_measured


def plan() -> None:
    """`oreal-plan`: exit status 0 where it fits, 1 where it does not or the configuration is wrong."""
    parser = argparse.ArgumentParser(
        prog="oreal-plan",
        description="Says before anything is started whether a run fits into memory, rank by rank and phase by phase, "
        "how long a step takes, and what to change first. Starts nothing and needs no GPU and no site values.",
        epilog="example: oreal-plan experiment=oreal_32b parallel.recompute=selective",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for oreal-train")
    parser.add_argument("--devices", type=int, help="trainer processes; default: resources.trainer_devices")
    parser.add_argument("--measured", type=Path, metavar="RUN", help="a run's directory, whose metrics are used")
    parser.add_argument("--search", action="store_true", help="look for layouts that fit, quickest first")
    arguments = parser.parse_intermixed_args()
    console = Console(highlight=False, soft_wrap=True)
    reporting(lambda: _plan(console, arguments))


def _plan(console: Console, arguments: argparse.Namespace) -> int:
    config = planned_config(arguments.overrides, console)
    measured = read_measured(arguments.measured) if arguments.measured else None
    replan = planner_of(config, devices=arguments.devices, measured=measured)
    if arguments.search:
        with console.status("layouts") as status:
            plans = search(
                config,
                replan,
                num_devices(config, arguments.devices),
                lambda done, of: status.update(f"layout {done + 1} of {of}"),
            )
        show_search(console, plans)
        return 0 if plans else 1
    with console.status("counting"):
        planned = replan(config)
    show_plan(console, planned, measured)
    return suggest(console, planned, replan)


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
    from oreal_megatron.models.footprint import FootprintMeter
    from oreal_megatron.rollout.embedded import sample

    geometry, sampling = _geometry(config), config.rollout.sampling
    meter = FootprintMeter(
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
        from oreal_megatron.convert.huggingface import geometry_of

        geometry = geometry_of(Path(str(config.model.path)))
    if geometry.vocab_size is None:
        from oreal_megatron.data.tokenizer import load_tokenizer

        geometry = geometry.model_copy(update={"vocab_size": len(load_tokenizer(config.model.tokenizer))})
    return geometry


def submit() -> None:
    """`oreal-submit`: plans, renders, shows, submits."""
    parser = argparse.ArgumentParser(
        prog="oreal-submit",
        description="Submits a run to SLURM: plans it first and refuses what cannot fit, writes the batch script into "
        "run.dir, shows it, submits it, and says how to follow it.",
        epilog="example: oreal-submit experiment=oreal_32b cluster=mine --test-only",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for oreal-train")
    parser.add_argument("--nodes", type=int, help="spread the trainer over so many nodes; default: as few as hold it")
    parser.add_argument("--server-nodes", type=int, help="spread the rollout servers over so many; default: likewise")
    parser.add_argument("--chain", type=int, default=1, metavar="N", help="N jobs, each after the one before it")
    parser.add_argument("--test-only", action="store_true", help="ask SLURM when it would start, and submit nothing")
    parser.add_argument("--force", action="store_true", help="submit what the planner says cannot fit")
    arguments = parser.parse_intermixed_args()
    console = Console(highlight=False, soft_wrap=True)
    reporting(lambda: _submit(console, arguments))


def _submit(console: Console, arguments: argparse.Namespace) -> int:
    raw = composed(arguments.overrides)
    if is_dry_run(raw):
        for key, (before, small) in layout_mapping(raw).items():
            console.print(f"dry run: {key} {before} becomes {small}")
        raw = shrunk(raw)
    config, cluster, nodes = checked(
        raw,
        lambda config, cluster: allocation(
            config,
            num_devices(config, None),
            arguments.nodes,
            server_nodes=arguments.server_nodes,
            judge_nodes=cluster.judge_nodes,
        ),
    )
    replan = planner_of(config)
    with console.status("planning"):
        planned = replan(config)
    show_plan(console, planned)
    if config.run.dry_run:
        whole = planned_config([*arguments.overrides, "run.dry_run=false"], console)
        console.print(
            f"with its own layout, every stage built without memory: {planner_of(whole)(whole).memory.verdict}"
        )
    status = suggest(console, planned, replan)
    if status and not arguments.force:
        console.print("not submitted (--force submits it all the same)")
        return status
    directory = Path(config.run.dir).resolve() / "slurm"
    script = directory / "job.sbatch"
    overrides = [*arguments.overrides, f"run.dir={Path(config.run.dir).resolve()}"]
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(script, rendered(config, cluster, nodes, overrides, script))
    console.print(f"\n[bold]{script}[/]")
    console.print(script.read_text(), markup=False)
    console.print(tested(script))
    if arguments.test_only:
        return 0
    job = None
    for _ in range(arguments.chain):
        job = submitted(script, after=job)
        console.print(f"[bold]submitted job {job}[/]")
    console.print(
        f"follow it:  tail -F {directory}/job-{job}.log {directory}/logs-{job}/trainer_rank_0.log\n"
        f"stop it:    scancel --batch --signal=TERM {job}   (saves and queues again)   scancel {job}   (ends it)"
    )
    return 0


def doctor() -> None:
    """`oreal-doctor`: exit status 1 where something that the experiment needs is missing."""
    parser = argparse.ArgumentParser(
        prog="oreal-doctor",
        description="Says what this machine has and what an experiment lacks on it, with the command that mends it.",
        epilog="example: srun --gpus-per-node=8 oreal-doctor experiment=oreal_32b",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for oreal-train")
    arguments = parser.parse_intermixed_args()
    console = Console(highlight=False, soft_wrap=True)
    reporting(lambda: _doctor(console, arguments))


def _doctor(console: Console, arguments: argparse.Namespace) -> int:
    config = planned_config(arguments.overrides, console)
    with console.status("looking"):
        findings = examine(config)
    for finding in findings:
        mark = "[red]missing[/]" if finding.is_problem else "[green]there[/]  " if finding.found else "absent "
        console.print(f"{mark}  {finding.name:20} {escape(finding.found or finding.remedy)}")  # pip's [extras] too
    return int(any(finding.is_problem for finding in findings))


def reporting(run: Callable[[], int]) -> None:
    """Ends with the status that `run` returns, or with 1 and a plain message."""
    try:
        sys.exit(run())
    except (ConfigError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
