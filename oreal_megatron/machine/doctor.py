"""Findings about this machine: what it has, what an experiment needs, and how to install what is missing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from oreal_megatron.config import TrainConfig
from oreal_megatron.machine.probe import Part, probe
from oreal_megatron.machine.requirements import asked, install_line, violations_of

_SECONDS = 60
DEVICE_NAMES = {"a100_80gb": "A100", "h100_80gb": "H100"}
"""Part of the driver's name of a device, by resources.device."""


@dataclass(frozen=True)
class Finding:
    """A piece of software or hardware that a run may need."""

    name: str
    found: str | None
    """Version or description; None if it is missing."""
    needed: bool
    """Whether the experiment needs it."""
    remedy: str
    """Command or change of configuration for a machine without it."""

    @property
    def is_problem(self) -> bool:
        """Whether it is needed and missing."""
        return self.needed and self.found is None


def examine(config: TrainConfig) -> list[Finding]:
    """Returns findings in the order of installation, then settings of the experiment that this machine cannot run."""
    machine = probe()
    on_gpu = config.resources.device != "cpu"
    wanted = DEVICE_NAMES.get(config.resources.device, "")
    cards = _answer(["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"])
    fitting = [line for line in (cards or "").splitlines() if wanted in line]
    seen = f"{len(fitting)} x {fitting[0]}" if fitting else None
    enough = len(fitting) >= config.resources.devices_per_node
    slurm = _answer(["sinfo", "--version"])
    needs = asked(config)
    servers = config.rollout.backend == "sglang"
    cuda = machine.cuda if machine.has_cuda else None
    findings = [
        Finding("Python", sys.version.split()[0], True, ""),
        Finding(
            "GPUs",
            seen if enough or not on_gpu else None,
            on_gpu,
            f"resources.devices_per_node is {config.resources.devices_per_node} x {wanted}, found: "
            f"{cards or 'no nvidia-smi'}. Run this on a compute node (srun), or override resources."
            if on_gpu
            else "resources.device=cpu needs none",
        ),
        Finding("torch", machine.torch.found, True, _because(machine.torch, "make setup")),
        Finding(
            "CUDA in torch",
            cuda,
            on_gpu,
            "pip install a torch wheel for nvidia-smi's CUDA" if on_gpu else "resources.device=cpu hides GPUs",
        ),
        Finding("NCCL", machine.nccl.found if cuda else None, on_gpu, "comes with a torch wheel for CUDA"),
        Finding("megatron-core", machine.megatron.found, True, _because(machine.megatron, "make setup")),
        Finding(
            "Transformer Engine",
            machine.transformer_engine.found,
            "transformer_engine" in needs,
            _because(machine.transformer_engine, f"{install_line(machine)}, or model.implementation=local"),
        ),
        Finding(
            "apex (NVIDIA's)",
            machine.apex.found,
            "apex" in needs,
            _because(machine.apex, "for parallel.fused_weight_gradients; NGC containers have it"),
        ),
        Finding("SGLang", machine.sglang.found, servers, "pip install '.[sglang]', or rollout=embedded"),
        Finding("SLURM", slurm, False, "needed for oreal-submit: a login node of the cluster"),
    ]
    if (geometry := config.model.geometry) is not None:
        for violation in violations_of(config, geometry, machine):
            findings.append(Finding(violation.key, None, True, f"{violation.value}: {violation.remedy}"))
    return findings


def _because(part: Part, remedy: str) -> str:
    return f"{remedy} ({part.problem})" if part.problem else remedy


def _answer(command: Sequence[str]) -> str | None:
    try:
        outcome = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = outcome.stdout.strip()
    return lines if outcome.returncode == 0 and lines else None
