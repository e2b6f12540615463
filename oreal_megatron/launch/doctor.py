"""What this machine has, what an experiment needs, and the command that mends the difference. Nothing is imported here.

Packages are probed in processes of their own: an import that crashes takes nothing along.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from oreal_megatron.config import TrainConfig

_SECONDS = 180


@dataclass(frozen=True)
class Finding:
    """One thing that a run may need."""

    name: str
    found: str | None
    """Version or figure; None: not there."""
    needed: bool
    remedy: str
    """The command or the change that mends it, where it is needed and not there."""

    @property
    def is_problem(self) -> bool:
        return self.needed and self.found is None


# What a probe prints is the finding; any failure is "not there".
_PROBES = {
    "torch": "import torch; print(torch.__version__)",
    "CUDA": "import torch; assert torch.cuda.is_available(); print(torch.version.cuda)",
    "NCCL": "import torch; assert torch.cuda.is_available(); print('.'.join(map(str, torch.cuda.nccl.version())))",
    "megatron-core": "import megatron.core as m; print(m.__version__)",
    # Torch first: Transformer Engine imports only after it. A layer shows that it works, not only imports.
    "Transformer Engine": "import torch, transformer_engine.pytorch as te, transformer_engine as t; "
    "te.Linear(16, 16, device='cuda'); print(t.__version__)",
    # The package of that name on PyPI is another one: NVIDIA's has this extension.
    "apex": "import torch, amp_C, fused_weight_gradient_mlp_cuda; print('with fused weight gradients')",
    "SGLang": "import importlib.metadata as m; print(m.version('sglang'))",
}


def examine(config: TrainConfig) -> list[Finding]:
    """Everything that this experiment could need, in the order in which it is installed."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        found = dict(zip(_PROBES, pool.map(_probe, _PROBES.values()), strict=True))
    on_gpu = config.resources.device != "cpu"
    wanted = {"a100_80gb": "A100", "h100_80gb": "H100"}.get(config.resources.device, "")
    cards = _answer(["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"])
    fitting = [line for line in (cards or "").splitlines() if wanted in line]
    seen = f"{len(fitting)} x {fitting[0]}" if fitting else None
    enough = len(fitting) >= config.resources.devices_per_node
    slurm = _answer(["sinfo", "--version"])
    te = config.model.implementation == "transformer_engine"
    servers = config.rollout.backend == "sglang"
    return [
        Finding("Python", sys.version.split()[0], True, ""),
        Finding(
            "GPUs",
            seen if enough or not on_gpu else None,
            on_gpu,
            f"resources.devices_per_node is {config.resources.devices_per_node} x {wanted}, found: "
            f"{cards or 'no nvidia-smi'}; run this on a compute node (srun), or override resources",
        ),
        Finding("torch", found["torch"], True, "make setup"),
        Finding("CUDA in torch", found["CUDA"], on_gpu, "pip install a torch wheel for CUDA; see nvidia-smi's version"),
        Finding("NCCL", found["NCCL"], on_gpu, "comes with a torch wheel for CUDA"),
        Finding("megatron-core", found["megatron-core"], True, "make setup"),
        Finding(
            "Transformer Engine",
            found["Transformer Engine"],
            te,
            "pip install --no-build-isolation '.[te]' beside a CUDA torch, or model.implementation=local",
        ),
        Finding("apex (NVIDIA's)", found["apex"], False, "optional: fused weight gradients; in NGC containers"),
        Finding("SGLang", found["SGLang"], servers, "pip install '.[sglang]', or rollout=embedded"),
        Finding("SLURM", slurm, False, "needed for oreal-submit: a login node of the cluster"),
    ]


def _probe(code: str) -> str | None:
    return _answer([sys.executable, "-c", code])


def _answer(command: Sequence[str]) -> str | None:
    try:
        outcome = subprocess.run(
            command, capture_output=True, text=True, timeout=_SECONDS, env=os.environ | {"PYTHONWARNINGS": "ignore"}
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = outcome.stdout.strip()
    return lines if outcome.returncode == 0 and lines else None
