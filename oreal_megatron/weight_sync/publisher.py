"""A publication: new weights to paused servers by one of several transports, then an audit, the same for all of them.

servers/pool.py pauses the servers before a publication, and flushes, labels and continues them after it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from oreal_megatron.config import SGLangConfig
from oreal_megatron.distributed.cpu_backend import collective_backend
from oreal_megatron.extensions import transport_class
from oreal_megatron.weight_sync.audit import Auditor
from oreal_megatron.weight_sync.broadcast import BroadcastTransport
from oreal_megatron.weight_sync.commands import CommandChannel
from oreal_megatron.weight_sync.direct import DirectTransport
from oreal_megatron.weight_sync.disk import DiskTransport
from oreal_megatron.weight_sync.ipc import IpcTransport
from oreal_megatron.weight_sync.planner import plan_resharding
from oreal_megatron.weight_sync.sglang_layout import CPU_FEED_FORWARD_MULTIPLE, SGLangLayout
from oreal_megatron.weight_sync.source import PolicyShards
from oreal_megatron.weight_sync.types import PausedServer, TransferResult, Transport


class Publisher:
    """Sends the policy's weights to servers and audits them. Every trainer rank calls every method."""

    def __init__(self, transport: Transport, auditor: Auditor, channel: CommandChannel, *, uses_nccl: bool):
        """uses_nccl: whether the transport connects trainer and servers by NCCL."""
        self._transport = transport
        self._auditor = auditor
        self._channel = channel
        self._uses_nccl = uses_nccl

    def prepare(self, weight_version: int) -> None:
        """See Transport."""
        self._transport.prepare(weight_version)

    def deliver(self, servers: Sequence[PausedServer]) -> TransferResult:
        """Sends the weights to all `servers` and audits those that report success.

        A server with another version of NCCL than the trainer's is refused before it joins a group: NCCL itself would
        end the processes of both sides, or wait. servers: read on the main rank only.
        """
        failures = self._channel.nccl_mismatches(servers) if self._uses_nccl else {}
        sums = self._auditor.start_sums()
        sent = self._transport.send([server for server in servers if server.name not in failures])
        if not isinstance(sent, TransferResult):
            name = f"{type(self._transport).__module__}.{type(self._transport).__qualname__}"
            raise ValueError(f"rollout.sglang.transport = {name}: send returned {sent!r}; return a TransferResult")
        failures |= sent.failures
        received = [server for server in servers if server.name not in failures]
        found, seconds = self._auditor.audit(received, sums, sent.checksums)
        return replace(sent, failures={**failures, **found}, seconds={**sent.seconds, "audit": seconds})

    def close(self) -> None:
        self._transport.close()
        self._auditor.close()


def build_publisher(
    servers: SGLangConfig, shards: PolicyShards, *, directory: Path, config_json: Mapping[str, Any]
) -> Publisher:
    """Builds the configured transport with its audit. Every rank calls it.

    directory, config_json: for the transport `disk` and those of the user's own.

    Raises:
        ValueError: the model does not split over a server's ranks, or the user's own transport cannot be made.
    """
    layout = SGLangLayout(
        tensor=servers.tensor,
        feed_forward_multiple=CPU_FEED_FORWARD_MULTIPLE if servers.device == "cpu" else 1,
        fp8=servers.dtype == "fp8",
    )
    plan = plan_resharding(shards.table, shards.geometry, shards.layout, layout)
    # Workers time out before the HTTP request that they delay does, so that they can report the reason.
    # Launched servers are on the main rank's host; its address is then the one that the other ranks know.
    peers = [*(urlsplit(url).hostname or "" for url in servers.urls), os.environ.get("MASTER_ADDR", "")]
    channel = CommandChannel(shards, plan, timeout_seconds=servers.control_seconds / 2, peers=peers)
    bucket_bytes = servers.bucket_mib * 2**20
    transport: Transport
    match servers.transport:
        case "direct":
            transport = DirectTransport(shards, plan, channel, bucket_bytes=bucket_bytes, full_every=servers.full_every)
        case "broadcast":
            transport = BroadcastTransport(shards, channel, bucket_bytes=bucket_bytes)
        case "ipc":
            transport = IpcTransport(shards, plan, channel, bucket_bytes=bucket_bytes)
        case "disk":
            transport = DiskTransport(shards, directory, config_json=config_json)
        case _:
            own = transport_class(servers)
            assert own is not None
            transport = own(shards=shards, directory=directory, config_json=config_json)
    uses_nccl = servers.transport in ("direct", "broadcast") and collective_backend() == "nccl"
    return Publisher(transport, Auditor(shards, plan, channel), channel, uses_nccl=uses_nccl)
