"""The contract of rollout engine, publisher and transports: servers that take weights, and results of transfers."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from oreal_megatron.servers.client import ServerClient


@dataclass(frozen=True)
class PausedServer:
    """A server that takes weight updates, usable from any thread; its requests run on the servers' event loop.

    Every request returns a future that raises ConnectionError if the server is lost, or ValueError if it refuses.
    """

    client: ServerClient
    index: int
    """Number of the server among all servers of the run; it tells which trainer devices a colocated server shares."""
    run: Callable[[Coroutine[Any, Any, None]], Future[None]]
    """Starts a coroutine on the servers' event loop."""

    @property
    def name(self) -> str:
        return self.client.url

    def update_weights_from_tensor(self, payloads: Sequence[bytes], load_format: str) -> Future[None]:
        """Hands each tensor-parallel rank its payload, a pickled list of (name, tensor)."""
        return self.run(self.client.update_weights_from_tensor(payloads, load_format))

    def update_weights_from_disk(self, directory: Path) -> Future[None]:
        """Has the server load a Hugging Face directory."""
        return self.run(self.client.update_weights_from_disk(directory))

    def init_weights_update_group(self, group: Mapping[str, Any]) -> Future[None]:
        """Has every rank of the server join a process group; see SGLang's /init_weights_update_group."""
        return self.run(self.client.init_weights_update_group(group))

    def update_weights_from_distributed(self, tensors: Mapping[str, Any]) -> Future[None]:
        """Has the server take tensors that are broadcast in a group; see SGLang's /update_weights_from_distributed."""
        return self.run(self.client.update_weights_from_distributed(tensors))

    def destroy_weights_update_group(self, name: str) -> Future[None]:
        """Has every rank of the server leave a process group."""
        return self.run(self.client.destroy_weights_update_group(name))


@dataclass(frozen=True)
class TransferFailure:
    """The reason why a server does not have the weights."""

    reason: str
    is_lost: bool = False
    """Whether the server itself is gone; otherwise a second transfer may succeed."""


@dataclass(frozen=True, kw_only=True)
class TransferResult:
    """The result of sending weights to servers, the same on all trainer ranks."""

    failures: Mapping[str, TransferFailure] = field(default_factory=dict)
    """Failures by server name; all other servers have the weights."""
    checksums: Mapping[str, Sequence[Mapping[str, int]]] = field(default_factory=dict)
    """Checksums that workers computed of all their parameters after their last write, by server name and by
    tensor-parallel rank, on the main rank only. The audit asks servers without them."""
    num_bytes: int = 0
    """Bytes that left the trainer."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Seconds of each part. plan: until the first command; transfer: until the last byte left the trainer; load: from
    then until the servers have the weights; audit: the comparison with the trainer's weights."""


class Transport(Protocol):
    """A way for weights to reach servers. Every trainer rank calls every method, together with the others.

    A class of the user's own is made with the keywords `shards` (PolicyShards), `directory` (of
    rollout.sglang.weights_dir) and `config_json` (of the served model), and `settings` where it has that parameter; see
    docs/extending.md.
    """

    def prepare(self, weight_version: int) -> None:
        """Does the part of the work that is possible while servers still generate.

        Raises:
            OSError: a file could not be written.
        """

    def send(self, servers: Sequence[PausedServer]) -> TransferResult:
        """Sends the policy's present weights to all `servers` (read on the main rank only), without an audit.

        The result is the same on every rank. A server that cannot be sent to is one of its failures, not an exception.
        A second call sends again to servers that failed and are not lost.
        """

    def close(self) -> None:
        """Ends what connects trainer and servers; called once, also after an error."""


def failure_of_answer(answer: Future[None]) -> TransferFailure | None:
    """Waits for a server's answer and returns the reason why the request failed, or None."""
    try:
        answer.result()
    except (ConnectionError, ValueError) as error:
        return TransferFailure(str(error), is_lost=isinstance(error, ConnectionError))
    return None
