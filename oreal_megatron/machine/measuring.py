"""Measures the devices of this job: matrix products, memory, and all-reduces within and between nodes.

    python -m oreal_megatron.machine.measuring --device cpu

A process for each device, as torchrun starts them; alone without its environment. All processes measure at the same
time. The first prints one line of JSON, with the slowest process's figure of each kind.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.benchmark import Timer

# Sizes beyond which the figures stay the same: rows of square matrices, bytes of a copy and of an all-reduce.
_SIZES = {"cuda": (8192, 4 << 30, 256 << 20), "cpu": (1024, 64 << 20, 16 << 20)}
_REPETITIONS = 20
"""Repetitions of an all-reduce: all processes must make as many."""


def matrix_flops(rows: int, device: torch.device, seconds: float) -> float:
    """Returns the FLOP/s of a product of square matrices, in bf16 on a GPU and in fp32 on a CPU."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = (torch.randn(rows, rows, device=device, dtype=dtype) for _ in range(2))
    return 2 * rows**3 / Timer("a @ b", globals={"a": a, "b": b}).blocked_autorange(min_run_time=seconds).median


def memory_bandwidth(num_bytes: int, device: torch.device, seconds: float) -> float:
    """Returns the bytes per second, read and written, of a copy in the device's memory."""
    a, b = (torch.zeros(num_bytes, device=device, dtype=torch.uint8) for _ in range(2))
    timer = Timer("a.copy_(b)", globals={"a": a, "b": b})
    return 2 * num_bytes / timer.blocked_autorange(min_run_time=seconds).median


def link_bandwidth(num_bytes: int, device: torch.device, ranks: list[int], group: dist.ProcessGroup) -> float:
    """Returns the bytes per second that each of the ranks sends in an all-reduce: the rate of the slowest link.

    A ring sends 2 (n - 1) / n of the bytes over every link (NCCL's bus bandwidth).
    """
    values = torch.zeros(num_bytes // 4, device=device)
    timer = Timer("all_reduce(values, group=group)", globals={"all_reduce": _reduced, "values": values, "group": group})
    timer.timeit(2)  # connects the ranks
    seconds = timer.timeit(_REPETITIONS).median
    return 2 * (len(ranks) - 1) / len(ranks) * num_bytes / seconds


def _reduced(values: Tensor, group: dist.ProcessGroup) -> None:
    dist.all_reduce(values, group=group)


def links(num_bytes: int, device: torch.device) -> dict[str, float]:
    """Returns the bandwidth between the devices of a node, and between nodes, where the job has several.

    Every device sends to other nodes at the same time, each to the device with its own number.
    """
    hosts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(hosts, os.environ.get("SLURMD_NODENAME") or socket.gethostname())
    nodes = [[rank for rank, host in enumerate(hosts) if host == name] for name in dict.fromkeys(hosts)]
    across = [list(ranks) for ranks in zip(*nodes, strict=False)]  # nodes of fewer devices leave the others' rest out
    found = {}
    for name, groups in (("node_bytes_per_second", nodes), ("link_bytes_per_second", across)):
        for ranks in groups:
            group = dist.new_group(ranks)
            if dist.get_rank() in ranks and len(ranks) > 1:
                found[name] = link_bandwidth(num_bytes, device, ranks, group)
    return found


def measured(device: torch.device, sizes: tuple[int, int, int], seconds: float) -> dict[str, Any]:
    """Returns the figures of the slowest process. Every process of the job calls it."""
    rows, copied, reduced = sizes
    found = {
        "matrix_flops": matrix_flops(rows, device, seconds),
        "memory_bytes_per_second": memory_bandwidth(copied, device, seconds),
    }
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    if not dist.is_initialized():
        return {"device_name": name, **found}
    found |= links(reduced, device)
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, found)
    slowest = {key: min(part.get(key, math.inf) for part in parts) for part in parts for key in part}
    return {"device_name": name, **slowest}


def main() -> None:
    """Measures, and prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=tuple(_SIZES), required=True)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each figure; default: 2")
    parser.add_argument("--shrink", type=int, default=1, help="divisor of all sizes, for tests")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if arguments.device == "cuda":
        rank, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if rank >= count:
            sys.exit(
                f"torch sees {count} GPUs on this machine, and process {rank} (counted from 0) measures one. Start a "
                "process for each GPU (--devices), on a node that has them."
            )
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several:
        dist.init_process_group("nccl" if arguments.device == "cuda" else "gloo")
    rows, copied, reduced = _SIZES[arguments.device]
    shrink = arguments.shrink
    found = measured(device, (rows // shrink, copied // shrink, reduced // shrink), arguments.seconds)
    if not several or dist.get_rank() == 0:
        print(json.dumps(found), flush=True)
    if several:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
