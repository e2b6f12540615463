"""Figures of devices, and what share of them is counted on. Every figure of the planner that is not counted is here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Device:
    """One accelerator."""

    name: str
    memory: int
    """Bytes that the driver reports."""
    flops: float | None
    """bf16 multiply-adds counted twice, a second, dense; None: unknown."""
    fp8_flops: float | None
    """The same in FP8; None: it has none."""
    bandwidth: float | None
    """Of its memory, bytes a second."""
    link: float | None
    """To other nodes, bytes a second and device, one way."""
    overhead: int
    """Bytes of the framework: CUDA context, NCCL's buffers, cuBLAS workspaces."""
    server_workspace: int
    """Bytes that a server needs beside weights and KV cache: activations of a prefill chunk, CUDA graphs."""
    server_asleep: int
    """Bytes that a colocated server keeps while the trainer works: its CUDA context and graphs."""


# NVIDIA's data sheets of A100 80GB SXM and H100 SXM; links as in DGX A100 (200 Gb/s a GPU) and DGX H100 (400 Gb/s).
_CUDA = {"overhead": 3 * GIB, "server_workspace": 3 * GIB, "server_asleep": 2 * GIB}
_ACCELERATORS = {
    "a100_80gb": Device(
        name="A100 80GB", memory=80 * GIB, flops=312e12, bandwidth=2.039e12, link=25e9, fp8_flops=None, **_CUDA
    ),
    "h100_80gb": Device(
        name="H100 80GB", memory=81559 * 2**20, flops=989e12, bandwidth=3.35e12, link=50e9, fp8_flops=1979e12, **_CUDA
    ),
}

# Shares of the data sheet's figures that large runs reach. Training: 0.40, as published MFUs of dense models of this
# size on both devices; a pass without gradients has no waiting optimizer; decoding reads weights and KV cache.
TRAINING_SHARE = 0.40
SCORING_SHARE = 0.45
FP8_SHARE = 0.75
"""Of these shares, for matrix products in FP8: their operands are rounded at the memory's speed. Assumed."""
DECODING_SHARE = 0.60
DECODING_LATENCY = 60e-6
"""Seconds a layer and token beside reading: two all-reduces within a node, and launches."""
LINK_SHARE = 0.70
RESHARD_PAUSE = 2.0
"""Seconds to pause, flush, audit and continue all servers."""
STORAGE_PER_NODE = 2e9
"""Bytes a second that a node writes to shared storage."""

SURE = 0.80
"""An estimate below this share never ran out of memory in 454 measured runs (arXiv 2411.06465)."""
FULL = 0.92
"""Above it a plan is refused: fragmentation takes the rest."""


def device_named(name: str, *, sharing: int) -> Device:
    """The device of `resources.device`; of a CPU, each of `sharing` processes has its share of the memory."""
    if name in _ACCELERATORS:
        return _ACCELERATORS[name]
    return Device(
        name="CPU",
        memory=_machine_memory() // sharing,
        flops=None,
        fp8_flops=None,
        bandwidth=None,
        link=None,
        overhead=0,
        server_workspace=0,
        server_asleep=0,
    )


def _machine_memory() -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["MemTotal"].split()[0]) * 1024
