"""Measurements of `oreal-doctor --measure`: this job's devices in processes of their own, then a rollout server."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from oreal_megatron.cli.planning import planned_geometry
from oreal_megatron.config import GeometryConfig, SGLangConfig, TrainConfig
from oreal_megatron.files import write_atomically
from oreal_megatron.machine.doctor import DEVICE_NAMES
from oreal_megatron.planner.figures import Figures, ServerFigures, server_kind
from oreal_megatron.servers.client import ServerClient, ServerLost
from oreal_megatron.servers.server_process import Launcher, ServerProcess, ServerStartError, choose_port
from oreal_megatron.servers.token_time import token_seconds
from oreal_megatron.weight_sync.sglang_layout import LOADER

_BATCHES = (1, 32, 256)
"""Numbers of responses at once at which the time of a token is measured, up to rollout.sglang.max_concurrency."""
_POLL_SECONDS = 0.5
_ERROR_LINES = 8


def measure(
    config: TrainConfig,
    path: Path,
    *,
    devices: int | None,
    url: str | None,
    progress: Callable[[str], None],
    options: Sequence[str] = (),
) -> bool:
    """Measures devices and a server, and writes the figures to `path`; returns whether this process wrote them.

    devices: processes to start on this machine; None: one for each of a node's GPUs, one on a CPU. In a job that
    torchrun or srun has started, this process is one of them. url: server to time; None: launch the servers' first one,
    where the configuration has servers. options: of machine.measuring.

    Raises:
        ValueError: a measurement failed, or this machine's devices or the server are not those of the configuration.
        OSError: the server was lost, or the file cannot be written.
    """
    if path.is_dir():
        raise ValueError(f"--measure {path}: it is a directory. Name a file.")
    progress("measuring devices")
    on_gpu = config.resources.device != "cpu"
    count = devices or (config.resources.devices_per_node if on_gpu else 1)
    found = _of_devices(["--device", "cuda" if on_gpu else "cpu", *options], count)
    if found is None:
        return False
    name = found["device_name"]
    if on_gpu and DEVICE_NAMES[config.resources.device] not in name:
        raise ValueError(
            f"resources.device = {config.resources.device}: this machine has {name}. Measure on a node of the cluster, "
            "or set resources.device to its devices."
        )
    servers, server = config.rollout.sglang, None
    if servers is not None:
        geometry = planned_geometry(config)
        context_tokens, seconds = asyncio.run(_of_server(config, servers, geometry, url, progress))
        kind: dict[str, Any] = server_kind(config, servers, geometry)
        server = ServerFigures(context_tokens=context_tokens, token_seconds=seconds, **kind)
    elif url is not None:
        raise ValueError(f"--server {url}: rollout.sglang is null. Choose an experiment with servers.")
    figures = Figures(device=config.resources.device, server=server, **found)
    write_atomically(path, yaml.safe_dump(figures.model_dump(), sort_keys=False))
    return True


def _of_devices(options: Sequence[str], count: int) -> dict[str, Any] | None:
    """Returns the figures of the job's devices on its first process; None on the others.

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


async def _of_server(
    config: TrainConfig,
    servers: SGLangConfig,
    geometry: GeometryConfig,
    url: str | None,
    progress: Callable[[str], None],
) -> tuple[int, dict[int, float]]:
    """Returns `token_seconds` of a running server, or of a server that is launched for it."""
    from oreal_megatron.conversion.huggingface import served_config

    process = None
    with tempfile.TemporaryDirectory() as directory:
        try:
            if url is None:
                model = Path(directory) / "model"
                described = served_config(
                    config.model.path,
                    geometry,
                    dtype=config.served_dtype,
                    fp8=servers.dtype == "fp8",
                    max_positions=config.model.max_sequence_length,
                    stop_token_id=0,  # responses go on behind it here
                )
                write_atomically(model / "config.json", json.dumps(described))
                launcher = Launcher(
                    config=servers,
                    model=model,
                    weight_loader=LOADER,
                    dtype=config.served_dtype,
                    max_sequence_length=config.model.max_sequence_length,
                    logs=Path(directory),
                )
                port = choose_port(servers, 0)
                process, url = launcher.start(0, port), f"http://{servers.host}:{port}"
            batches = [batch for batch in _BATCHES if batch <= servers.max_concurrency]
            client = ServerClient(
                url,
                max_concurrency=max(batches),
                control_seconds=servers.control_seconds,
                health_seconds=servers.health_seconds,
            )
            progress(f"waiting for the server at {url}")
            await _answers(client, servers, process)
            try:
                return await token_seconds(
                    client,
                    batches,
                    vocab_size=geometry.vocab_size or 1,
                    max_sequence_length=config.model.max_sequence_length,
                    progress=progress,
                )
            finally:
                await client.close()
        except ServerStartError as error:
            raise ValueError(str(error)) from error
        finally:
            if process is not None:
                process.stop()


async def _answers(client: ServerClient, servers: SGLangConfig, process: ServerProcess | None) -> None:
    """Waits until the server generates.

    Raises:
        ServerStartError: the launched server ended.
        ServerLost: it does not answer for rollout.sglang.startup_seconds; a running server must answer at once.
        ValueError: it has another number of tensor-parallel ranks than the configuration.
    """
    deadline = time.monotonic() + (servers.startup_seconds if process is not None else 0.0)
    while True:
        if process is not None and process.exit_code is not None:
            raise ServerStartError(f"the server ended with {process.exit_code} while it started:\n{process.log_tail()}")
        try:
            found = await client.describe()
            if await client.is_healthy(servers.health_seconds):
                break
        except ServerLost:
            if time.monotonic() > deadline:
                raise
        await asyncio.sleep(_POLL_SECONDS)
    if found.tensor != servers.tensor:
        raise ValueError(
            f"{client.url} has {found.tensor} tensor-parallel rank(s), and rollout.sglang.tensor is {servers.tensor}. "
            "Name a server of the configuration, or set rollout.sglang.tensor."
        )
