"""What a rollout engine is: token ids in, token ids and log-probabilities out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from oreal_megatron.config import SamplingConfig
from oreal_megatron.types import Completion, GenerationRequest


class RolloutEngine(Protocol):
    """Generates with the weights of the last `publish`."""

    weight_version: int
    """Of the last `publish`; 0 before the first."""

    def units(self, requests: Sequence[GenerationRequest]) -> list[list[int]]:
        """Indices of the requests that are generated, journalled and, after a kill, repeated as one.

        Depends on the requests alone, so that a restarted run finds the same units, on any layout.
        """

    def generate(
        self,
        units: Sequence[Sequence[GenerationRequest]],
        sampling: SamplingConfig,
        is_enough: Callable[[], bool] | None = None,
    ) -> Iterator[tuple[int, list[Completion]]]:
        """(index of the unit, one completion a request in order), as units finish.

        All ranks of a model replica call it with the same units and get all of them; other replicas have others.
        is_enough: asked now and then, from any thread, on the leading process of each replica; once it is true what is
        under way is broken off, and units come as they are then.
        """

    def publish(self, weight_version: int) -> Mapping[str, float]:
        """From now on generate with the policy's present weights, which are on the devices, stamped `weight_version`.

        Every rank calls it. Returns what a step's report shall say of it.
        """

    def generation_context(
        self, policy_on_device: Callable[[], AbstractContextManager[None]]
    ) -> AbstractContextManager[None]:
        """What `generate` is called in, by every rank.

        policy_on_device: brings the policy's weights, which are those of the last `publish`, to the devices. An engine
        with devices of its own, or none, has them there all the time; one that takes turns with the trainer on its
        devices has them there while it takes them, and gives everything back in the end.
        """

    def offload(self) -> None:
        """Gives the trainer's devices back, where a `publish` has taken them. Every rank calls it."""

    def close(self) -> None:
        """Ends whatever the engine started."""
