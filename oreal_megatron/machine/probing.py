"""Finds out what is installed and works by using it, and prints a line for each topic.

    python -m oreal_megatron.machine.probing TOPIC...

probe.py starts this in its own process, so that an import that crashes, hangs or exits does not end the run. A line is
the topic, a tab, and JSON: {"found": version} or {"problem": reason}.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from typing import Any

# Each topic imports what it probes; an import at the top would decide for all of them.


def torch_() -> dict[str, Any]:
    """Returns version, CUDA version and devices."""
    import torch

    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "devices": [[device.name, [device.major, device.minor]] for device in devices],
    }


def nccl() -> str:
    """Returns the version of NCCL in torch."""
    import torch

    return ".".join(map(str, torch.cuda.nccl.version()))


def megatron() -> str:
    """Returns the version of megatron-core."""
    import megatron.core

    return str(megatron.core.__version__)


def transformer_engine() -> str:
    """Returns the version of Transformer Engine, after a layer of it has computed.

    Raises:
        ImportError: Megatron-Core cannot use it.
        ArithmeticError: a layer computes numbers that are not finite.
    """
    import torch  # first: without it, its libraries are not found
    import transformer_engine
    import transformer_engine.pytorch as te

    version = str(transformer_engine.__version__)
    for name in ("Linear", "LayerNormLinear", "RMSNorm", "DotProductAttention"):
        layer = getattr(te, name, None)
        if not (isinstance(layer, type) and issubclass(layer, torch.nn.Module)):
            raise ImportError(f"{version} at {transformer_engine.__file__} has no layer {name}")
    # Megatron-Core replaces parts that it cannot import by placeholders, without an error.
    from megatron.core.extensions import transformer_engine as bound

    if not bound.HAVE_TE or not issubclass(bound.TELinear, te.Linear) or bound.te_general_gemm is None:
        raise ImportError(f"Megatron-Core cannot use {version}: it replaced missing parts by placeholders")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))  # this process' device
    torch.cuda.set_device(device)
    layer = te.Linear(32, 32, params_dtype=torch.bfloat16, device=device)
    out = layer(torch.ones(32, 32, dtype=torch.bfloat16, device=device))
    out.sum().backward()
    if not bool(torch.isfinite(out).all()):
        raise ArithmeticError(f"a linear layer of {version} computes numbers that are not finite")
    return version


def apex() -> str:
    """Returns the extensions of NVIDIA's apex that are installed.

    Raises:
        ImportError: they are missing; another package has the name apex too.
    """
    if importlib.util.find_spec("amp_C") is None:
        other = importlib.util.find_spec("apex")
        if other is None:
            raise ImportError("not installed")
        where = other.origin or ", ".join(other.submodule_search_locations or [])
        raise ImportError(f"the package apex at {where} is not NVIDIA's: it has no amp_C")
    for name in ("torch", "amp_C", "fused_weight_gradient_mlp_cuda"):  # torch first: the others need its libraries
        importlib.import_module(name)
    return "with fused weight gradients"


def sglang() -> str:
    """Returns the version of SGLang, which is not imported."""
    return importlib.metadata.version("sglang")


TOPICS: dict[str, Callable[[], Any]] = {
    "torch": torch_,
    "nccl": nccl,
    "megatron": megatron,
    "transformer_engine": transformer_engine,
    "apex": apex,
    "sglang": sglang,
}


def main() -> None:
    """Probes the topics that the arguments name."""
    for topic in sys.argv[1:]:
        try:
            found = {"found": TOPICS[topic]()}
        except Exception as error:  # an import may raise anything
            found = {"problem": f"{type(error).__name__}: {error}".splitlines()[0]}
        print(f"{topic}\t{json.dumps(found)}", flush=True)


if __name__ == "__main__":
    main()
