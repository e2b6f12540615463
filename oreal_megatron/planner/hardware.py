"""Figures of devices, and the shares of them that plans count on, where they are not measured (`figures.py`)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from oreal_megatron.planner.figures import Figures

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Device:
    """Figures of an accelerator."""

    name: str
    memory: int
    """Bytes of memory that the driver reports."""
    flops: float | None
    """Dense bf16 FLOP/s, a multiply-add counted as two; None if unknown."""
    fp8_flops: float | None
    """Dense FP8 FLOP/s; None if the device has no FP8."""
    bandwidth: float | None
    """Memory bandwidth in bytes per second; None if unknown."""
    link: float | None
    """Bandwidth to other nodes in bytes per second, of one device, one way; None if unknown."""
    overhead: int
    """Bytes of CUDA context, NCCL buffers and cuBLAS workspaces."""
    server_workspace: int
    """Bytes that a server needs besides weights and KV cache: activations of a prefill chunk, CUDA graphs."""
    server_offloaded: int
    """Bytes that an offloaded colocated server keeps while the trainer works: its CUDA context and graphs."""


# Source: NVIDIA's data sheets of A100 80GB SXM and H100 SXM; links as in DGX A100 (200 Gb/s for each GPU) and DGX H100
# (400 Gb/s).
_CUDA = {"overhead": 3 * GIB, "server_workspace": 3 * GIB, "server_offloaded": 2 * GIB}
_ACCELERATORS = {
    "a100_80gb": Device(
        name="A100 80GB", memory=80 * GIB, flops=312e12, bandwidth=2.039e12, link=25e9, fp8_flops=None, **_CUDA
    ),
    "h100_80gb": Device(
        name="H100 80GB", memory=81559 * 2**20, flops=989e12, bandwidth=3.35e12, link=50e9, fp8_flops=1979e12, **_CUDA
    ),
}

# Shares of the data sheet's figures that large runs reach. In training, 0.40 is the published MFU of dense models of
# this size on both devices. A pass without gradients does not wait for the optimizer. Decoding reads weights and KV
# cache.
TRAINING_SHARE = 0.40
SCORING_SHARE = 0.45
FP8_SHARE = 0.75
"""Factor on these shares for FP8 matrix products, whose operands are rounded at memory speed. Assumed."""
MATRIX_SHARE = 0.70
"""Share of the data sheet's FLOP/s that a large matrix product alone reaches. Assumed, for measured products."""
DECODING_SHARE = 0.60
COPY_SHARE = 0.90
"""Share of the data sheet's bandwidth that a large copy reaches. Assumed, for measured copies."""
DECODING_LATENCY = 60e-6
"""Seconds for each layer and token besides reading: two all-reduces within a node, and kernel launches."""
LINK_SHARE = 0.70
RESHARD_PAUSE = 2.0
"""Seconds to pause, flush, audit and resume all servers."""
STORAGE_PER_NODE = 2e9
"""Bytes per second that a node writes to shared storage."""

SURE = 0.80
"""Share of memory below which no estimate ran out of memory in 454 measured runs (arXiv 2411.06465)."""
FULL = 0.92
"""Share of memory above which a plan does not fit, because fragmentation takes the rest."""


def device_named(name: str, *, sharing: int) -> Device:
    """Returns the device that `resources.device` names. On a CPU, `sharing` processes share the machine's memory."""
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
        server_offloaded=0,
    )


def with_figures(device: Device, figures: Figures) -> Device:
    """Returns the device with what its data sheet would say for the measured figures.

    The shares of this file then hold for it too: training reaches TRAINING_SHARE / MATRIX_SHARE of a measured product.
    A link that is measured within a node only stands for one that no data sheet gives, as on a CPU.
    """
    flops, link = figures.matrix_flops / MATRIX_SHARE, figures.link_bytes_per_second
    if link is None and device.link is None:
        link = figures.node_bytes_per_second
    return replace(
        device,
        flops=flops,
        fp8_flops=device.fp8_flops * flops / device.flops if device.fp8_flops and device.flops else None,
        bandwidth=figures.memory_bytes_per_second / COPY_SHARE,
        link=device.link if link is None else link / LINK_SHARE,
    )


def _machine_memory() -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["MemTotal"].split()[0]) * 1024
