"""Checks that a server serves the policy's model with the run's options, whenever the run connects to it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from oreal_megatron.config import GeometryConfig, SGLangConfig
from oreal_megatron.config.rollout import VERIFICATION_OPTIONS
from oreal_megatron.conversion.huggingface import geometry_of, read_model
from oreal_megatron.servers.client import ServerDescription
from oreal_megatron.servers.server_process import NO_WEIGHTS, OFFLOADED, check_version, run_of_label

_REPORTED_AS: Mapping[Any, str] = {"NEXTN": "EAGLE"}
"""Names of --speculative-algorithm -> what /server_info says of them."""


def fingerprint(geometry: GeometryConfig, dtype: str, config_json: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the properties that fix a model's weights and token ids: sizes, biases, norms, vocabulary, RoPE, dtype.

    geometry: with vocab_size. config_json: names the quantisation.
    """
    sizes = geometry.model_dump(exclude={"init_std"})
    quantisation = config_json.get("quantization_config")
    return {**sizes, "head_dim": geometry.attention_head_dim, "dtype": dtype, "quantization_config": quantisation}


def digest(properties: Mapping[str, Any]) -> str:
    """Returns a short text that is the same for equal properties."""
    return hashlib.blake2b(json.dumps(properties, sort_keys=True).encode(), digest_size=6).hexdigest()


def check_server(url: str, description: ServerDescription, expected: Mapping[str, Any]) -> None:
    """Raises ValueError, which names both sides, if a server has another model or dtype, or is too old."""
    check_version(url, description.version)
    path = Path(description.model_path)
    if not (path / "config.json").is_file():
        raise ValueError(
            f"{url} serves {description.model_path}, whose config.json cannot be read here, so it cannot be compared "
            "with the policy; start the server from a directory that both machines can read"
        )
    served = fingerprint(geometry_of(path, is_served=True), description.dtype, read_model(path, is_served=True).config)
    if served != expected:
        differing = ", ".join(
            f"{name} {served[name]!r} instead of {value!r}" for name, value in expected.items() if served[name] != value
        )
        raise ValueError(
            f"{url} serves another model: {description.model_path} has fingerprint {digest(served)}, the policy "
            f"{digest(expected)}; {differing}"
        )


def check_options(url: str, found: ServerDescription, config: SGLangConfig, weight_loader: str, run: str) -> None:
    """Raises ValueError, which names the remedy, if the run cannot use a server's options, or another run uses it.

    run: id of this run in labels of weights.
    """
    if weight_loader not in found.weight_loaders:
        raise ValueError(
            f"{url} was started without --custom-weight-loader {weight_loader}, which loads and audits weights; start "
            "it with that option and with this package on its PYTHONPATH"
        )
    for key, has, wanted in (("tensor", found.tensor, config.tensor), ("device", found.device, config.device)):
        if has != wanted:
            raise ValueError(
                f"{url} has {key} {has}, rollout.sglang.{key} is {wanted}; set rollout.sglang.{key}={has}, or start "
                "another server"
            )
    for name, default in VERIFICATION_OPTIONS.items():
        served, option = found.verification[name], config.options.get(name, default)
        if served != _REPORTED_AS.get(option, option):
            raise ValueError(
                f"{url} was started with {name} {served}, rollout.sglang.arguments.{name} is {option}; start the "
                "server with the run's options of speculative decoding, or give the run those of the server"
            )
    if config.shares_gpus and not found.saves_memory:
        raise ValueError(
            f"{url} was started without --enable-memory-saver, so it cannot release memory to a trainer on its "
            "devices; start it with that option, or set rollout.sglang.placement=disaggregated"
        )
    if found.weight_label == OFFLOADED:
        raise ValueError(f"{url} has released its memory to a run that ended without resuming it; restart the server")
    if run_of_label(found.weight_label) not in (None, run):
        raise ValueError(
            f"{url} has weights {found.weight_label} of another run, which may be live; name other servers in "
            "rollout.sglang.urls. If that run has ended without freeing the server, restart the server, or run: curl "
            f"{url}/update_weight_version -H 'Content-Type: application/json' -d "
            f'\'{{"new_version": "{NO_WEIGHTS}", "abort_all_requests": false}}\''
        )
