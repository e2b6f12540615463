"""Probe of this machine's software and devices, in processes of their own, whose crashes do not end the run."""

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
    """A piece of software: its version or description, or why it cannot be used."""

    found: str | None
    """Version or description; None if it cannot be used."""
    problem: str = ""
    """Reason why it cannot be used."""


@dataclass(frozen=True)
class Machine:
    """Results of a probe. Parts that were not probed say so as their problem."""

    torch: Part
    cuda: str | None
    """CUDA version that torch was built for; None if it was built without CUDA."""
    devices: tuple[tuple[str, Capability], ...]
    """Name and compute capability of each device that this process may use."""
    nccl: Part = Part(None, "not probed")
    megatron: Part = Part(None, "not probed")
    transformer_engine: Part = Part(None, "not probed")
    apex: Part = Part(None, "not probed")
    sglang: Part = Part(None, "not probed")

    @property
    def has_cuda(self) -> bool:
        """Whether torch is built for CUDA and sees a device."""
        return self.cuda is not None and bool(self.devices)

    @property
    def cuda_version(self) -> tuple[int, int]:
        """CUDA version as numbers; (0, 0) without CUDA."""
        major, minor = (*(self.cuda or "0.0").split("."), "0")[:2]
        return int(major), int(minor)


def probe(topics: Iterable[Topic] = ("nccl", "megatron", "transformer_engine", "apex", "sglang")) -> Machine:
    """Probes torch and `topics`. Each takes a few seconds, because it is imported in a new process."""
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
    """Returns topic -> {"found": ...} or {"problem": ...}.

    A topic that ends its process gets a problem, and a new process probes the remaining topics.
    """
    answers: dict[str, dict[str, Any]] = {}
    while missing := [topic for topic in topics if topic not in answers]:
        lines, end = _run([sys.executable, "-m", "oreal_megatron.machine.probing", *missing])
        for line in lines:
            topic, tab, answer = line.partition("\t")
            if tab and topic in missing:
                answers[topic] = json.loads(answer)
        if left := [topic for topic in missing if topic not in answers]:
            answers[left[0]] = {"problem": f"the process that probed it {end}"}
    return answers


def _run(command: Sequence[str]) -> tuple[list[str], str]:
    """Returns the lines of the command's output, and how it ended."""
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
