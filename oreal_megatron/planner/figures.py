"""Figures measured on a cluster, in the place of the planner's assumptions: the file of `oreal-doctor --measure`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import yaml
from pydantic import Field

from oreal_megatron.config import GeometryConfig, Positive, Section, SGLangConfig, TrainConfig, parse_section
from oreal_megatron.config.fields import PositiveFloat, Text
from oreal_megatron.planner.sizes import num_parameters


class ServerFigures(Section):
    """Times of a rollout server."""

    parameters: Positive
    """Parameters of the served model."""
    tensor: Positive
    """rollout.sglang.tensor of the server."""
    dtype: Text
    """Data type that the server computes in, or fp8."""
    context_tokens: Positive
    """Mean length of a sequence while its tokens were timed."""
    token_seconds: Mapping[Positive, PositiveFloat] = Field(min_length=1)
    """Seconds of a token by the number of responses at once."""

    def seconds_at(self, sequences: float) -> float:
        """Returns the seconds of a token for a number of responses at once: linear between the measured numbers.

        Beyond the largest it goes on with the slope of the last two; below the smallest it is that of the smallest.
        """
        batches, seconds = (np.array(values) for values in zip(*sorted(self.token_seconds.items()), strict=True))
        if len(batches) > 1 and sequences > batches[-1]:
            slope = (seconds[-1] - seconds[-2]) / (batches[-1] - batches[-2])
            return float(seconds[-1] + max(slope, 0.0) * (sequences - batches[-1]))
        return float(np.interp(sequences, batches, seconds))


class Figures(Section):
    """Figures of the devices of a cluster, those of the slowest device."""

    device: Text
    """resources.device for which they were measured."""
    device_name: Text
    """The device's own name."""
    matrix_flops: PositiveFloat
    """FLOP/s of a large matrix product: bf16 on a GPU, fp32 on a CPU."""
    memory_bytes_per_second: PositiveFloat
    """Bytes read and written by a copy in the device's memory."""
    node_bytes_per_second: PositiveFloat | None = None
    """Bytes that a device sends to the others of its node in an all-reduce; null: measured on one device."""
    link_bytes_per_second: PositiveFloat | None = None
    """Bytes that a device sends to other nodes in an all-reduce; null: measured on one node."""
    server: ServerFigures | None = None
    """Times of a rollout server; null: none was measured."""


def read_figures(path: Path, config: TrainConfig, geometry: GeometryConfig) -> Figures:
    """Reads the figures for the plan of a configuration.

    Raises:
        ConfigError: a key is unknown or missing, or a value is no positive number.
        ValueError: the file cannot be read, or was measured for another device, model or kind of server.
    """
    if not path.exists():
        raise ValueError(f"--measured {path}: there is neither a file of figures nor the directory of a run.")
    try:
        raw = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"--measured {path}: it cannot be read as YAML: {error}") from error
    figures = parse_section(str(path), raw, Figures)
    if figures.device != config.resources.device:
        raise ValueError(
            f"--measured {path}: device is {figures.device} ({figures.device_name}), and resources.device is "
            f"{config.resources.device}. Measure on the nodes of the plan, or set resources.device={figures.device}."
        )
    servers = config.rollout.sglang
    if figures.server is not None and servers is not None:
        planned = server_kind(config, servers, geometry)
        differing = [
            f"server.{key} is {getattr(figures.server, key)}, and the plan has {value}"
            for key, value in planned.items()
            if getattr(figures.server, key) != value
        ]
        if differing:
            raise ValueError(
                f"--measured {path}: {'; '.join(differing)}. Measure with the model and servers of the plan, or remove "
                "`server` from the file."
            )
    return figures


def server_kind(config: TrainConfig, servers: SGLangConfig, geometry: GeometryConfig) -> dict[str, int | str]:
    """Returns what the time of a token depends on, by the keys of `ServerFigures`."""
    return {
        "parameters": num_parameters(geometry),
        "tensor": servers.tensor,
        "dtype": servers.dtype or config.served_dtype,
    }
