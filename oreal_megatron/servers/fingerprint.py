"""Is a server's model the trainer's? Compared before the first prompt, and whenever contact was lost."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oreal_megatron.config import GeometryConfig
from oreal_megatron.conversion.huggingface import geometry_of, read_model
from oreal_megatron.servers.client import ServerDescription

_OLDEST_SGLANG = (0, 5, 23)


@dataclass(frozen=True)
class Fingerprint:
    """What weights and token ids depend on: sizes, biases, norms, vocabulary, rotary embedding, dtype, FP8."""

    fields: Mapping[str, Any]

    @classmethod
    def of(cls, geometry: GeometryConfig, dtype: str, config_json: Mapping[str, Any]) -> Fingerprint:
        """geometry: with vocab_size; its biases and norms tell the architecture. config_json: says how it is
        quantised.
        """
        head_dim = geometry.head_dim or geometry.hidden_size // geometry.num_attention_heads
        quantisation = config_json.get("quantization_config")
        sizes = geometry.model_dump(exclude={"init_std"})
        return cls({**sizes, "head_dim": head_dim, "dtype": dtype, "quantization_config": quantisation})

    def __str__(self) -> str:
        text = json.dumps(self.fields, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def check_server(url: str, description: ServerDescription, expected: Fingerprint) -> None:
    """Raises ValueError where a server serves another model, in another dtype, or is too old; names both sides."""
    version = tuple(int(part) for part in description.version.split("+")[0].split(".")[:3] if part.isdigit())
    if version < _OLDEST_SGLANG:
        raise ValueError(
            f"{url} runs SGLang {description.version}; {'.'.join(map(str, _OLDEST_SGLANG))} or newer is needed"
        )
    path = Path(description.model_path)
    if not (path / "config.json").is_file():
        raise ValueError(
            f"{url} serves {description.model_path}, whose config.json cannot be read here, so it cannot be compared "
            "with the policy: start the server from a directory that both see"
        )
    served = Fingerprint.of(geometry_of(path), description.dtype, read_model(path).config)
    if served.fields != expected.fields:
        differing = ", ".join(
            f"{name} {served.fields[name]!r} instead of {value!r}"
            for name, value in expected.fields.items()
            if served.fields[name] != value
        )
        raise ValueError(
            f"{url} serves another model: {description.model_path} has fingerprint {served}, the policy {expected}; "
            f"{differing}"
        )
