"""What a transport is, and what comes of sending: the interface that all of them have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol


class PausedServer(Protocol):
    """A server that takes weight updates. Futures raise ConnectionError (it is lost) or ValueError (it refuses)."""

    @property
    def name(self) -> str: ...

    @property
    def index(self) -> int:
        """Its number among all servers of the run, which says whose devices it shares where they are the trainer's."""

    def update_weights_from_tensor(self, payloads: Sequence[bytes], load_format: str) -> Future[None]:
        """payloads: one pickled list of (name, tensor) a tensor-parallel rank."""

    def update_weights_from_disk(self, directory: Path) -> Future[None]:
        """Takes the weights of a Hugging Face directory."""

    def init_weights_update_group(self, group: Mapping[str, Any]) -> Future[None]:
        """Every rank joins a process group; see SGLang's /init_weights_update_group."""

    def update_weights_from_distributed(self, tensors: Mapping[str, Any]) -> Future[None]:
        """Takes tensors that are broadcast in a group; see /update_weights_from_distributed."""

    def destroy_weights_update_group(self, name: str) -> Future[None]:
        """Forgets a group."""


@dataclass(frozen=True)
class TransferFailure:
    """Why a server does not have the weights."""

    reason: str
    is_lost: bool = False
    """The server itself is gone; otherwise sending again may help."""


@dataclass(frozen=True, kw_only=True)
class TransferResult:
    """What came of sending to servers, the same on all trainer ranks."""

    failures: Mapping[str, TransferFailure] = field(default_factory=dict)
    """By server; the others have the weights, audited."""
    num_bytes: int = 0
    """That left the trainer."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """plan: before the first order. transfer: until the last byte has left the trainer. load: until the servers have
    them. audit."""


class Transport(Protocol):
    """A way for weights to reach servers. Every trainer rank calls every method, together with the others."""

    def prepare(self, weight_version: int) -> None:
        """What can be done while servers still generate.

        Raises:
            OSError: the disk refused.
        """

    def send(self, servers: Sequence[PausedServer]) -> TransferResult:
        """Has all `servers` (read on the main rank only) take the policy's present weights. No audit."""

    def close(self) -> None: ...


def failure_of_answer(answer: Future[None]) -> TransferFailure | None:
    """Why a server has not done what it was asked, when it has answered."""
    try:
        answer.result()
    except (ConnectionError, ValueError) as error:
        return TransferFailure(str(error), is_lost=isinstance(error, ConnectionError))
    return None
