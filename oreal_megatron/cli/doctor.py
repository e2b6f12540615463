"""`oreal-doctor`: shows what this machine has, and what an experiment needs that is missing; or measures its speed."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from rich.console import Console
from rich.markup import escape

from oreal_megatron.cli.arguments import add_overrides, command_parser, positive
from oreal_megatron.cli.errors import run_command
from oreal_megatron.cli.planning import planned_config, planned_geometry
from oreal_megatron.config import TrainConfig
from oreal_megatron.distributed.environment import devices_hidden
from oreal_megatron.files import write_atomically
from oreal_megatron.log import quiet_libraries
from oreal_megatron.machine.doctor import DEVICE_NAMES, examine
from oreal_megatron.planner.figures import Figures, ServerFigures, server_kind

_ERROR_LINES = 8


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs `oreal-doctor`. Exit status 1: something that the experiment needs is missing."""
    parser = command_parser(
        "oreal-doctor",
        "Shows what this machine has, and what an experiment needs that is missing, with the command that installs it.",
        example="srun --gpus-per-node=8 oreal-doctor experiment=oreal_32b",
    )
    add_overrides(parser)
    parser.add_argument(
        "--measure",
        type=Path,
        metavar="FILE",
        help="measure instead: matrix products, memory, links between devices, and the time of a token on a rollout "
        "server; oreal-plan --measured FILE plans with the figures",
    )
    parser.add_argument("--server", metavar="URL", help="running server to time; default: launch one of the experiment")
    parser.add_argument(
        "--devices",
        type=positive,
        help="processes that measure here; default: one for each GPU of a node, one on a CPU",
    )
    arguments = parser.parse_intermixed_args(argv)
    run_command(lambda: _doctor(Console(highlight=False, soft_wrap=True), arguments))


def _doctor(console: Console, arguments: argparse.Namespace) -> int:
    config = planned_config(arguments.overrides, console, config_dir=arguments.config_dir)
    if arguments.measure is not None:
        path, options = arguments.measure, {"devices": arguments.devices, "url": arguments.server}
        with console.status("measuring") as status:
            figures = measure(config, path, **options, progress=lambda note: status.update(note))
        if figures is not None:
            text = yaml.safe_dump(figures.model_dump(), sort_keys=False)
            write_atomically(path, text)
            console.print(f"{escape(str(path))}\n\n{escape(text)}", end="")
        return 0
    if arguments.server or arguments.devices:
        raise ValueError("--server and --devices belong to --measure FILE. Add it, or leave them out.")
    # The experiment will see no GPU either.
    with console.status("examining this machine"), devices_hidden(when=config.resources.device == "cpu"):
        findings = examine(config)
    for finding in findings:
        mark = "[red]missing[/]" if finding.is_problem else "[green]found[/]  " if finding.found else "absent "
        # A remedy may contain brackets, such as pip's [extras], which are no markup.
        console.print(f"{mark}  {finding.name:20} {escape(finding.found or finding.remedy)}")
    return int(any(finding.is_problem for finding in findings))


def measure(
    config: TrainConfig,
    path: Path,
    *,
    devices: int | None,
    url: str | None,
    progress: Callable[[str], None],
    options: Sequence[str] = (),
) -> Figures | None:
    """Measures devices and, where the configuration has servers, one of them. Returns None on all ranks but the first.

    path: the file of the figures; a launched server leaves its log in the directory `path`.server. devices: processes
    to start on this machine; None: one for each of a node's GPUs, one on a CPU. In a job that torchrun has started,
    this process is one of them. url: server to time; None: launch one. options: of machine.measuring.

    Raises:
        ValueError: a measurement failed, or this machine's devices or the server are not those of the configuration.
        OSError: the server was lost.
    """
    servers = config.rollout.sglang
    if path.is_dir():
        raise ValueError(f"--measure {path}: it is a directory. Name a file.")
    if url is not None and servers is None:
        raise ValueError(f"--server {url}: rollout.sglang is null. Choose an experiment with servers.")
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and "WORLD_SIZE" not in os.environ:
        raise ValueError(
            f"--measure {path}: srun has started {os.environ['SLURM_STEP_NUM_TASKS']} tasks, each of which would "
            "measure all devices of its node. Start one task a node (--ntasks-per-node=1), with torchrun on several."
        )
    progress("measuring devices")
    on_gpu = config.resources.device != "cpu"
    count = devices or (config.resources.devices_per_node if on_gpu else 1)
    found = _of_devices(["--device", "cuda" if on_gpu else "cpu", *options], count)
    if found is None:
        return None
    if on_gpu and DEVICE_NAMES[config.resources.device] not in found["device_name"]:
        raise ValueError(
            f"resources.device = {config.resources.device}: this machine has {found['device_name']}. Measure on a node "
            "of the cluster, or set resources.device to its devices."
        )
    if servers is None:
        return Figures(device=config.resources.device, **found)
    quiet_libraries()
    from oreal_megatron.rollout.token_time import time_tokens

    geometry = planned_geometry(config)
    context_tokens, seconds = time_tokens(
        servers,
        geometry,
        dtype=config.served_dtype,
        max_sequence_length=config.model.max_sequence_length,
        model_path=config.model.path,
        url=url,
        directory=path.with_name(f"{path.name}.server"),
        progress=progress,
    )
    kind: dict[str, Any] = server_kind(config, servers, geometry)
    server = ServerFigures(context_tokens=context_tokens, token_seconds=seconds, **kind)
    return Figures(device=config.resources.device, server=server, **found)


def _of_devices(options: Sequence[str], count: int) -> dict[str, Any] | None:
    """Returns the figures of the job's devices on its first process; None on the others.

    They are measured in processes of their own, which leave the devices to the server when they end.

    Raises:
        ValueError: a process failed; the message has its last lines.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    several = count > 1 and "WORLD_SIZE" not in os.environ
    command = [sys.executable, *(launcher if several else ()), "-m", "oreal_megatron.machine.measuring", *options]
    outcome = subprocess.run(command, capture_output=True, text=True)
    if outcome.returncode:
        # After the error torchrun says where it happened, in many lines.
        lines = list(itertools.takewhile(lambda line: "distributed/elastic" not in line, outcome.stderr.splitlines()))
        said = "\n".join(f"    {line}" for line in lines[-_ERROR_LINES:])
        raise ValueError(f"the measurement of {count} device(s) ended with status {outcome.returncode}:\n{said}")
    answers = [line for line in outcome.stdout.splitlines() if line.startswith("{")]
    return json.loads(answers[-1]) if answers else None


if __name__ == "__main__":
    main()
