"""`oreal-submit`: plans a run, renders its batch script and submits it to SLURM."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.markup import escape

from oreal_megatron.cli.arguments import add_overrides, command_parser, positive
from oreal_megatron.cli.errors import run_command
from oreal_megatron.cli.planning import num_devices, planned_config, planner_of, suggest
from oreal_megatron.compose import composed
from oreal_megatron.dry_run import is_dry_run, layout_mapping, shrunk
from oreal_megatron.files import write_atomically, write_parts_atomically
from oreal_megatron.overrides import literal
from oreal_megatron.planner.tables import print_plan
from oreal_megatron.slurm.checks import checked
from oreal_megatron.slurm.cluster import absolute
from oreal_megatron.slurm.sbatch import allocation, configuration_of_job, rendered, submitted, tested


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs `oreal-submit`. Exit status 1: the run does not fit, or SLURM or the checks refuse it."""
    parser = command_parser(
        "oreal-submit",
        "Submits a run to SLURM. Plans it first and refuses a run that cannot fit, writes the batch script into\n"
        "run.dir, shows it, submits it, and prints the commands that follow it.",
        example="oreal-submit experiment=oreal_32b cluster=mine --test-only",
    )
    add_overrides(parser)
    parser.add_argument("--nodes", type=positive, help="nodes of the trainer; default: as few as hold it")
    parser.add_argument(
        "--server-nodes", type=positive, help="nodes of the rollout servers; default: as few as hold them"
    )
    parser.add_argument("--chain", type=positive, default=1, metavar="N", help="submit N jobs, each after the last")
    parser.add_argument("--test-only", action="store_true", help="ask SLURM for the start time and submit nothing")
    parser.add_argument("--force", action="store_true", help="submit even if the plan does not fit")
    arguments = parser.parse_intermixed_args(argv)
    run_command(lambda: _submit(Console(highlight=False, soft_wrap=True), arguments))


def _submit(console: Console, arguments: argparse.Namespace) -> int:
    raw = composed(arguments.overrides, config_dir=arguments.config_dir)
    if is_dry_run(raw):
        for key, (before, small) in layout_mapping(raw).items():
            console.print(f"dry run: {key} {before} becomes {small}", markup=False)
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
    print_plan(console, planned)
    if config.run.dry_run:
        whole = planned_config([*arguments.overrides, "run.dry_run=false"], console, config_dir=arguments.config_dir)
        console.print(f"the experiment with its own layout: {planner_of(whole)(whole).memory.verdict}", markup=False)
    status = suggest(console, planned, replan)
    if status and not arguments.force:
        console.print("not submitted (--force submits it nevertheless)")
        return status
    directory = Path(absolute(config.run.dir)) / "slurm"
    script = directory / "job.sbatch"
    overrides = [*arguments.overrides, f"run.dir={literal(str(directory.parent))}"]
    configuration, files = configuration_of_job(directory, arguments.config_dir)
    text = rendered(config, cluster, nodes, overrides, logs=directory, configuration=configuration)
    console.print(f"\n[bold]{escape(str(script))}[/]")
    console.print(text, markup=False)
    console.print(tested(text), markup=False)
    if arguments.test_only:
        return 0
    for name, content in files.items():
        write_parts_atomically(configuration / name, [content])
    write_atomically(script, text)
    jobs: list[str] = []
    for _ in range(arguments.chain):
        jobs.append(submitted(script, after=jobs[-1] if jobs else None))
        console.print(f"[bold]submitted job {jobs[-1]}[/]")
    console.print(
        f"follow it:  tail -F {shlex.quote(f'{directory}/job-{jobs[0]}.log')} "
        f"{shlex.quote(f'{directory}/logs-{jobs[0]}/trainer_rank_0.log')}\n"
        f"stop it:    scancel --batch --signal=TERM {jobs[0]}   (saves and queues again)   "
        f"scancel {' '.join(jobs)}   (ends it)",
        markup=False,
    )
    return 0


if __name__ == "__main__":
    main()
