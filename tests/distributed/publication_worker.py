"""Trainer ranks publish to servers whose workers run the real weight loader without SGLang.

    python -m tests.distributed.publication_worker SOURCE SETTING    SETTING: see below, as JSON

Workers are processes that hold parameters as SGLang's do; a pipe stands for HTTP. On a CPU everything is forked from
this process, which has imported everything. Exits with an error where a tensor differs.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import pickle
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from oreal_megatron.config import GeometryConfig, ParallelConfig
from oreal_megatron.conversion.families import family_of
from oreal_megatron.conversion.huggingface import geometry_of
from oreal_megatron.distributed.cpu_backend import collective_backend, cpu_backend
from oreal_megatron.distributed.groups import parallel_groups
from oreal_megatron.weight_sync import worker
from oreal_megatron.weight_sync.audit import Auditor
from oreal_megatron.weight_sync.commands import CommandChannel
from oreal_megatron.weight_sync.direct import DirectTransport
from oreal_megatron.weight_sync.ipc import IpcTransport
from oreal_megatron.weight_sync.planner import plan_resharding
from oreal_megatron.weight_sync.publisher import Publisher
from oreal_megatron.weight_sync.sglang_layout import LOADER, SGLangLayout, served_tensors
from oreal_megatron.weight_sync.source import PolicyShards
from tests.ranks import run_ranks
from tests.tiny_models import policy_chunks
from tests.unit.weight_sync.test_planner import served


@dataclass(frozen=True)
class Setting:
    """Layouts, dtypes and transports of the publications."""

    layout: dict[str, int]
    """Parallel degrees of the trainer, which is in fp32."""
    world: int = 4
    served: str = "float32"
    """Dtype of the servers' weights: float32, bfloat16 or fp8."""
    num_servers: int = 2
    server_ranks: int = 2
    transports: Sequence[str] = ("direct", "ipc", "direct")
    device: str = "cpu"
    bucket_bytes: int = 4096
    full_every: int = 1
    """Above 1: changes alone are sent too, by the direct transport."""

    @property
    def server(self) -> SGLangLayout:
        return SGLangLayout(tensor=self.server_ranks, feed_forward_multiple=32, fp8=self.served == "fp8")

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the transfer."""
        return torch.float32 if self.served == "float32" else torch.bfloat16

    @property
    def processes(self) -> Any:
        """CUDA cannot be used in a fork of a process that has looked for it."""
        return multiprocessing.get_context("fork" if self.device == "cpu" else "spawn")


class Model:
    """A model with the method of SGLang's models that the loader calls."""

    def __init__(self, geometry: GeometryConfig, setting: Setting, rank: int):
        table = family_of(geometry).table(geometry, "causal")
        self.tensors = {
            name: torch.randn(shape).to(setting.device, getattr(torch, dtype))
            for tensor in served_tensors(table, geometry, setting.server, rank)
            for name, (dtype, shape) in tensor.parameters(str(setting.dtype).removeprefix("torch.")).items()
        }

    def named_parameters(self) -> Any:
        return self.tensors.items()


def work(pipe: Connection, geometry: GeometryConfig, setting: Setting, server: int, rank: int) -> None:
    """A tensor-parallel worker: executes commands, shows its tensors, or doubles a number of a tensor."""
    if setting.device != "cpu":
        # NCCL takes two ranks of one device only from different hosts.
        os.environ["NCCL_HOSTID"] = f"server {server} rank {rank}"
        torch.cuda.set_device((server * setting.server_ranks + rank) % setting.world)
    model = Model(geometry, setting, rank)
    while True:
        payload = pipe.recv_bytes()
        if payload == b"show":
            pipe.send({name: tensor.float().cpu().numpy() for name, tensor in model.tensors.items()})
        elif payload.startswith(b"tamper "):
            model.tensors[payload.split()[1].decode()].view(-1)[-1] *= 2
            pipe.send(None)
        else:
            worker.load(model, pickle.loads(payload))  # type: ignore[arg-type]
            pipe.send(None)


@dataclass
class Server:
    """The part of weight_sync.types.PausedServer that transports through the loader use."""

    index: int
    name: str
    pipes: list[Connection]
    pids: list[int]
    pool: ThreadPoolExecutor

    def ask(self, payloads: list[bytes]) -> list[Any]:
        try:
            for pipe, payload in zip(self.pipes, payloads, strict=True):
                pipe.send_bytes(payload)
            return [pipe.recv() for pipe in self.pipes]
        except (EOFError, OSError) as error:
            raise ConnectionError(f"{self.name}: {type(error).__name__}") from error

    def update_weights_from_tensor(self, payloads: list[bytes], load_format: str) -> Future[Any]:
        assert load_format == LOADER
        return self.pool.submit(self.ask, payloads)


def main(source: Path, setting: Setting) -> None:
    torch.set_num_threads(1)
    if (
        setting.device != "cpu"
    ):  # for the connection to the other host that NCCL is made to see; from 2.30 on it may be none
        os.environ |= {"NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1", "NCCL_NET": "Socket"}
        os.environ["NCCL_MULTI_RANK_GPU_ENABLE"] = "1"
    geometry = geometry_of(source)
    servers = []
    for number in range(setting.num_servers):
        pipes, pids = [], []
        for rank in range(setting.server_ranks):
            ours, theirs = setting.processes.Pipe()
            worker = setting.processes.Process(target=work, args=(theirs, geometry, setting, number, rank), daemon=True)
            worker.start()
            theirs.close()
            pipes.append(ours)
            pids.append(worker.pid)
        servers.append((number, f"server {number}", pipes, pids))
    run_ranks(setting.world, publish, source, setting, servers, processes=setting.processes)


def publish(rank: int, source: Path, setting: Setting, opened: list[Any]) -> None:
    geometry = geometry_of(source)
    config = ParallelConfig(micro_batch_tokens=64, timeout_seconds=120, **setting.layout)
    with cpu_backend(), parallel_groups(config, seed=0) as groups:
        shards = PolicyShards(policy_chunks(source, groups), geometry, groups, setting.dtype)
        servers = [Server(*one, ThreadPoolExecutor(1)) for one in opened] if groups.is_main else []
        execute(setting, shards, servers, source)


def execute(setting: Setting, shards: PolicyShards, servers: list[Any], source: Path) -> None:
    plan = plan_resharding(shards.table, shards.geometry, shards.layout, setting.server)
    channel = CommandChannel(shards, plan, timeout_seconds=60)
    auditor = Auditor(shards, plan, channel)
    kinds = {"direct": partial(DirectTransport, full_every=setting.full_every), "ipc": IpcTransport}
    uses_nccl = collective_backend() == "nccl"
    publishers = {
        name: Publisher(
            kinds[name](shards, plan, channel, bucket_bytes=setting.bucket_bytes),
            auditor,
            channel,
            uses_nccl=uses_nccl and name == "direct",
        )
        for name in dict.fromkeys(setting.transports)
    }
    for number, transport in enumerate(setting.transports, start=1):
        double(shards)
        result = publishers[transport].deliver(servers)
        assert not result.failures, result.failures
        compare(setting, servers, source, shards.geometry, factor=2**number)
    if setting.full_every > 1:
        send_changes(setting, shards, servers, publishers["direct"], source)
    if setting.served == "fp8":
        find_another_scale(shards, servers, auditor)
    if setting.num_servers > 1:
        lose_one(setting, shards, servers, publishers["direct"], source)
    for publisher in publishers.values():
        publisher.close()


def send_changes(setting: Setting, shards: PolicyShards, servers: list[Any], direct: Publisher, source: Path) -> None:
    """Doubles a layer's weights, and halves them again: the other weights do not travel."""
    whole = len(servers) * sum(tensor.num_elements for tensors in direct._auditor._targets for tensor in tensors)
    factor = 2 ** len(setting.transports)
    for number, by in enumerate((2.0, 0.5)):
        double(shards, by=by, part=".layers.1.")
        direct.prepare(number)
        result = direct.deliver(servers)
        assert not result.failures, result.failures
        assert not shards.groups.is_main or 0 < result.num_bytes < whole * setting.dtype.itemsize / 2
        compare(setting, servers, source, shards.geometry, factor=factor, of_layer_1=factor * (2 if by > 1 else 1))


def find_another_scale(shards: PolicyShards, servers: list[Any], auditor: Auditor) -> None:
    """Doubles a scale in one worker: the bytes that arrived are right, but the worker would compute with others."""
    name = "model.layers.1.mlp.down_proj.weight_scale_inv"
    if shards.groups.is_main:
        servers[0].pipes[-1].send_bytes(f"tamper {name}".encode())
        servers[0].pipes[-1].recv()
    failures, _ = auditor.audit(servers, auditor.start_sums(), {})
    assert list(failures) == ["server 0"] and name in failures["server 0"].reason, failures


def lose_one(setting: Setting, shards: PolicyShards, servers: list[Any], direct: Publisher, source: Path) -> None:
    double(shards)
    if shards.groups.is_main:
        os.kill(servers[1].pids[0], signal.SIGKILL)
    # All are one group: the server that lives does not have the weights either, and takes them when sent to alone.
    failures = direct.deliver(servers).failures
    assert failures["server 1"].is_lost and not failures["server 0"].is_lost, failures
    assert not direct.deliver(servers[:1]).failures
    compare(setting, servers[:1], source, shards.geometry, factor=2 ** (len(setting.transports) + 1))


@torch.no_grad()
def double(shards: PolicyShards, *, by: float = 2.0, part: str = "") -> None:
    """An update, exact in every dtype. part: of the names of the tensors."""
    for name, tensor in shards.tensors().items():
        if part in name:
            tensor.mul_(by)


def compare(
    setting: Setting,
    servers: list[Any],
    source: Path,
    geometry: GeometryConfig,
    *,
    factor: int,
    of_layer_1: int | None = None,
) -> None:
    """Checks that every worker holds its part of the source's weights times `factor`, and zeros in the padding."""
    saved = load_file(source / "model.safetensors")
    weights = {
        name: (of_layer_1 or factor if ".layers.1." in name else factor) * tensor.to(setting.dtype).float().numpy()
        for name, tensor in saved.items()
    }
    for server in servers:
        for rank, tensors in enumerate(server.ask([b"show"] * setting.server_ranks)):
            for name, plain in served(weights, geometry, setting.server, rank).items():
                expected = in_fp8(name, plain) if f"{name}_scale_inv" in tensors else {name: plain}
                for part, values in expected.items():
                    np.testing.assert_array_equal(tensors[part], values, err_msg=f"{server.name} rank {rank}: {part}")
            assert (setting.served == "fp8") == any(name.endswith("_scale_inv") for name in tensors)


def in_fp8(name: str, plain: Any) -> dict[str, Any]:
    """A weight's e4m3 numbers and its scales, block by block."""
    quantities, scales = np.empty_like(plain), np.empty([size // 128 for size in plain.shape], np.float32)
    for row, column in np.ndindex(scales.shape):
        block = slice(128 * row, 128 * row + 128), slice(128 * column, 128 * column + 128)
        scale = 2.0 ** math.ceil(math.log2(np.abs(plain[block]).max() / 448))
        quantities[block] = torch.from_numpy(plain[block] / scale).to(torch.float8_e4m3fn).float().numpy()
        scales[row, column] = scale
    return {name: quantities, f"{name}_scale_inv": scales}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Setting(**json.loads(sys.argv[2])))
