"""Builds the engine on SGLang servers from a policy: launcher, pool, publisher, and the check of every server."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from oreal_megatron.config import GeometryConfig, SGLangConfig
from oreal_megatron.conversion.huggingface import served_config
from oreal_megatron.distributed.groups import ParallelGroups
from oreal_megatron.files import kept_id
from oreal_megatron.models.policy import Policy
from oreal_megatron.models.virtual_stages import ModelChunks, chunks_of
from oreal_megatron.rollout.sglang_engine import SGLangEngine
from oreal_megatron.servers.fingerprint import check_server, fingerprint
from oreal_megatron.servers.pool import ServerPool
from oreal_megatron.servers.server import ServerSettings
from oreal_megatron.servers.server_process import Launcher, start_directory
from oreal_megatron.stopping import StopRequest
from oreal_megatron.timeline import Timeline
from oreal_megatron.weight_sync.publisher import build_publisher
from oreal_megatron.weight_sync.sglang_layout import LOADER
from oreal_megatron.weight_sync.source import PolicyShards


def build_sglang_engine(
    servers: SGLangConfig,
    policy: Policy | ModelChunks,
    geometry: GeometryConfig,
    groups: ParallelGroups,
    *,
    directory: Path,
    stop: StopRequest,
    timeline: Timeline,
    dtype: str,
    stop_token_id: int,
    max_sequence_length: int,
    timeout_seconds: float,
    keep_cache: bool = False,
    model_path: str | None = None,
    kv_tokens: int | None = None,
    first_device: int = 0,
    num_generations: int = 1,
    members: range | None = None,
    weights: str = "",
) -> SGLangEngine:
    """Builds an engine whose servers start, or are attached to, at its first publication. Every rank calls it.

    geometry: with vocab_size. directory: of the run, for its id, servers' logs and the weights of the transport `disk`.
    stop: ends waits for servers. timeline: recorder of this process. dtype: dtype that servers compute in.
    timeout_seconds: limit of the groups' collectives. keep_cache: see ServerSettings. model_path: the policy's Hugging
    Face directory; None if only its geometry is known. kv_tokens: see Launcher. first_device: index of the servers'
    first device on a machine. num_generations, members: see ServerPool. weights: directory below that of the transport
    `disk`, different for each engine of a run.

    Raises:
        ValueError: the model does not split over a server's ranks.
    """
    settings, described = server_settings(
        servers,
        geometry,
        directory=directory,
        dtype=dtype,
        stop_token_id=stop_token_id,
        max_sequence_length=max_sequence_length,
        model_path=model_path,
        run=groups.from_main(kept_id(directory / "servers" / "run_id") if groups.is_main else ""),
        kv_tokens=kv_tokens,
        first_device=first_device,
    )
    publisher = build_publisher(
        servers,
        PolicyShards(chunks_of(policy), geometry, groups, getattr(torch, dtype)),
        directory=(Path(servers.weights_dir) if servers.weights_dir is not None else directory / "weights") / weights,
        config_json=described,
    )
    return SGLangEngine(
        ServerPool(
            replace(settings, timeline=timeline, keep_cache=keep_cache),
            stop_token_id=stop_token_id,
            config_json=described,
            replica=groups.data_rank,
            num_replicas=groups.data_size,
            num_generations=num_generations,
            members=members,
        ),
        publisher,
        groups,
        stop=stop,
        timeout_seconds=timeout_seconds,
        shares_devices=servers.shares_devices,
    )


def server_settings(
    servers: SGLangConfig,
    geometry: GeometryConfig,
    *,
    directory: Path,
    dtype: str,
    stop_token_id: int,
    max_sequence_length: int,
    model_path: str | None,
    run: str,
    kv_tokens: int | None = None,
    first_device: int = 0,
) -> tuple[ServerSettings, dict[str, Any]]:
    """Returns the settings of servers of a model, and the config.json that they start from.

    run: id of the run. The other arguments are those of `build_sglang_engine`.
    """
    described = served_config(
        model_path,
        geometry,
        dtype=dtype,
        fp8=servers.dtype == "fp8",
        max_positions=max_sequence_length,
        stop_token_id=stop_token_id,
    )
    expected = fingerprint(geometry, dtype, described)
    launcher = Launcher(
        config=servers,
        model=start_directory(directory / "servers"),
        weight_loader=LOADER,
        dtype=dtype,
        max_sequence_length=max_sequence_length,
        logs=directory / "servers",
        kv_tokens=kv_tokens,
        first_device=first_device,
    )
    settings = ServerSettings(
        config=servers,
        launcher=launcher,
        check=lambda url, description: check_server(url, description, expected),
        run=run,
    )
    return settings, described
