"""SGLang servers on CPU with a policy that is published to them, for tests."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from oreal_megatron.compose import composed, validated
from oreal_megatron.config import SGLangConfig
from oreal_megatron.conversion.huggingface import geometry_of
from oreal_megatron.files import write_atomically
from oreal_megatron.log import PACKAGE
from oreal_megatron.models.virtual_stages import chunks_of
from oreal_megatron.rollout.build_sglang import build_sglang_engine
from oreal_megatron.stopping import StopRequest
from oreal_megatron.timeline import Timeline
from oreal_megatron.weight_sync.disk import DiskTransport
from oreal_megatron.weight_sync.source import PolicyShards
from tests.tiny_models import as_policy

STOP = 7
MAX_SEQUENCE_LENGTH = 256


def has_sglang() -> bool:
    """Returns whether `make sglang-deps` has installed SGLang."""
    return (Path(sys.prefix) / "sglang" / "sglang").is_dir()


RUN = "test"


def servers_config(**options: Any) -> SGLangConfig:
    """Returns the settings of `rollout=sglang_cpu` with long time limits and `options`."""
    config = validated(composed(["experiment=arithmetic", "rollout=sglang_cpu"])).rollout.sglang
    assert config is not None
    patient = {
        "max_concurrency": 16,
        "startup_seconds": 900.0,
        "health_seconds": 60.0,
        "control_seconds": 120.0,
        "arguments": {"max-total-tokens": 8192, "disable-overlap-schedule": True},
    }
    return SGLangConfig(**{**config.model_dump(), **patient, **options})


class ListHandler(logging.Handler):
    """Appends every message to a list."""

    def __init__(self, messages: list[str]):
        super().__init__()
        self._messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        self._messages.append(record.getMessage())


@dataclass
class Servers:
    """An engine, the policy that it publishes, and the messages that it logged."""

    engine: Any
    policy: Any
    shards: Any
    directory: Path
    said: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._initial = [parameter.detach().clone() for parameter in self.policy.parameters()]

    @property
    def pool(self) -> Any:
        return self.engine.pool

    def perturb(self) -> None:
        """Gives the policy new weights of the same magnitude, so that rounding errors stay alike."""
        noise = torch.Generator().manual_seed(self.engine.weight_version + 1)
        with torch.no_grad():
            for parameter, initial in zip(self.policy.parameters(), self._initial, strict=True):
                parameter.copy_(initial + 0.1 * torch.randn(initial.shape, generator=noise))

    def written(self) -> Path:
        """Writes the policy's present weights as a Hugging Face directory, for transformers."""
        DiskTransport(self.shards, self.directory / "written", config_json=self.engine.pool.config_json).prepare(0)
        return self.directory / "written" / "version_000000"

    def generate(self, requests: Any, sampling: Any, num_enough: int | None = None) -> list[Any]:
        """Returns one completion a request, in order. num_enough: units after which the rest is aborted."""
        units = self.engine.units(requests)
        found: dict[int, Any] = {}
        is_enough = None if num_enough is None else lambda: len(found) >= num_enough
        asked = [[requests[i] for i in unit] for unit in units]
        for position, completions in self.engine.generate(asked, sampling, is_enough):
            assert position not in found
            found[position] = completions
        pairs = [(i, c) for position, unit in enumerate(units) for i, c in zip(unit, found[position], strict=True)]
        return [completion for _, completion in sorted(pairs, key=lambda pair: pair[0])]


def open_servers(groups: Any, source: Path, directory: Path, *, run: str = RUN, **options: Any) -> Servers:
    """Returns an engine with the Megatron policy of a Hugging Face directory, before the first publication.

    run: id of the run, which may take the servers of another engine of the same run. options: see `servers_config`.
    """
    if groups.is_main:
        write_atomically(directory / "servers" / "run_id", run)
    policy, geometry = as_policy(source, groups), geometry_of(source)
    said: list[str] = []
    logging.getLogger(PACKAGE).addHandler(ListHandler(said))
    servers = servers_config(**options)
    dtype = "float32" if servers.dtype is None else "bfloat16"
    engine = build_sglang_engine(
        servers,
        policy,
        geometry,
        groups,
        directory=directory,
        stop=StopRequest(),
        timeline=Timeline(),
        dtype=dtype,
        stop_token_id=STOP,
        max_sequence_length=MAX_SEQUENCE_LENGTH,
        timeout_seconds=600,
        model_path=str(source),
    )
    return Servers(
        engine, policy, PolicyShards(chunks_of(policy), geometry, groups, getattr(torch, dtype)), directory, said
    )
