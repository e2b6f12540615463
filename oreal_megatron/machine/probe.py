"""What this machine has, asked of processes that cannot take the run down."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from oreal_megatron.config.fp8_recipes import Capability

Topic = Literal["torch", "nccl", "megatron", "transformer_engine", "apex", "sglang"]
_SECONDS = 180


@dataclass(frozen=True)
class Part:
    """One thing that may be there: its version or description, or why it is not."""

    found: str | None
    problem: str = ""


@dataclass(frozen=True)
class Machine:
    """What was found. Topics that were not asked about are absent."""

    torch: Part
    cuda: str | None
    """Version that torch was built for; None: built without."""
    devices: tuple[tuple[str, Capability], ...]
    """Name and compute capability of each that this process may use."""
    nccl: Part = Part(None, "not asked")
    megatron: Part = Part(None, "not asked")
    transformer_engine: Part = Part(None, "not asked")
    apex: Part = Part(None, "not asked")
    sglang: Part = Part(None, "not asked")

    @property
    def has_cuda(self) -> bool:
        return self.cuda is not None and bool(self.devices)

    @property
    def cuda_version(self) -> tuple[int, int]:
        """(0, 0): none."""
        major, minor = (*(self.cuda or "0.0").split("."), "0")[:2]
        return int(major), int(minor)


def probe(topics: Iterable[Topic] = ("nccl", "megatron", "transformer_engine", "apex", "sglang")) -> Machine:
    """Asks about torch and `topics`. A few seconds each: everything is imported anew."""
    answers = _answers(["torch", *topics])
    torch = answers.pop("torch")
    details: dict[str, Any] = torch.get("found") or {}
    return Machine(
        torch=Part(details.get("version"), torch.get("problem", "")),
        cuda=details.get("cuda"),
        devices=tuple((name, (major, minor)) for name, (major, minor) in details.get("devices", [])),
        **{topic: Part(answer.get("found"), answer.get("problem", "")) for topic, answer in answers.items()},
    )


def _answers(topics: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Topic -> {"found": ...} or {"problem": ...}; a topic that ends its process is left behind, the others go on."""
    answers: dict[str, dict[str, Any]] = {}
    while missing := [topic for topic in topics if topic not in answers]:
        lines, end = _run([sys.executable, "-m", "oreal_megatron.machine.probing", *missing])
        for line in lines:
            topic, tab, answer = line.partition("\t")
            if tab and topic in missing:
                answers[topic] = json.loads(answer)
        if left := [topic for topic in missing if topic not in answers]:
            answers[left[0]] = {"problem": f"looking at it {end}"}
    return answers


def _run(command: Sequence[str]) -> tuple[list[str], str]:
    """Lines of its output, and how it ended."""
    quiet = os.environ | {"PYTHONWARNINGS": "ignore"}
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=quiet
    ) as process:
        try:
            output, _ = process.communicate(timeout=_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.communicate()[0].splitlines(), f"took more than {_SECONDS} s"
    ended = f"died of signal {-process.returncode}" if process.returncode < 0 else f"ended with {process.returncode}"
    return output.splitlines(), ended
