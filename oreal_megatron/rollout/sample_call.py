"""The requests for the responses to some prompts, cut into units; and the staleness of what they gave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from oreal_megatron.config import SamplingConfig
from oreal_megatron.rollout.journal import unit_key
from oreal_megatron.types import Completion, GenerationRequest, GradedRollout, Prompt


class SampleCall:
    """Requests of a batch, cut into units, which are generated, graded and journalled as a whole."""

    def __init__(
        self,
        batch_name: str,
        asked: Sequence[tuple[Prompt, int]],
        requests: Sequence[GenerationRequest],
        sampling: SamplingConfig,
        *,
        units: Sequence[Sequence[int]],
        weight_version: int | None,
    ):
        """Names the units for the journal.

        asked: prompt and sample index of every request. units: the indices of each unit's requests. weight_version: see
        `unit_key`.
        """
        self.batch_name, self.asked, self.requests, self.sampling = batch_name, asked, requests, sampling
        self.units = units
        self.keys = [
            unit_key([asked[i][0] for i in unit], [requests[i] for i in unit], sampling, weight_version)
            for unit in units
        ]

    def unit(self, index: int) -> list[GenerationRequest]:
        return [self.requests[i] for i in self.units[index]]

    def longest_first(self, units: Sequence[int]) -> list[int]:
        """Returns units in the order in which they are to be generated: longest expected responses first.

        A unit whose length is not known counts as the mean of the others; among equals the order stays.
        """
        expected = {index: self._expected_tokens(index) for index in units}
        known = [tokens for tokens in expected.values() if tokens is not None]
        mean = sum(known) / max(len(known), 1)
        ranked = {index: mean if tokens is None else tokens for index, tokens in expected.items()}
        return sorted(units, key=ranked.__getitem__, reverse=True)

    def _expected_tokens(self, index: int) -> float | None:
        """Returns the largest number of tokens that is expected of a response of a unit; None: not known."""
        known = [self.requests[i].expected_tokens for i in self.units[index]]
        return max((tokens for tokens in known if tokens is not None), default=None)

    def by_prompt(self, graded: Mapping[int, Sequence[GradedRollout]]) -> dict[str, list[GradedRollout]]:
        """Returns the complete groups of the graded units by prompt id, in the order of the prompts."""
        at = {i: rollout for index, unit in graded.items() for i, rollout in zip(self.units[index], unit, strict=True)}
        places: dict[str, list[int]] = {}
        for i, (prompt, _) in enumerate(self.asked):
            places.setdefault(prompt.id, []).append(i)
        return {id: [at[i] for i in group] for id, group in places.items() if all(i in at for i in group)}


def can_go_on(partial: Completion, max_new_tokens: int) -> bool:
    """Returns whether a beginning of a response, or a finished one, is within a limit that may be new."""
    is_finished = partial.finish_reason is not None
    return len(partial.token_ids) <= max_new_tokens - (not is_finished)


def staleness(groups: Sequence[Sequence[GradedRollout]], version: int) -> dict[str, float]:
    """Returns metrics of the staleness of the groups' tokens, at weight version `version`."""
    rollouts = [graded.rollout for group in groups for graded in group]
    num_tokens = sum(rollout.num_response_tokens for rollout in rollouts)
    spans = [span for rollout in rollouts for span in rollout.weight_spans]
    older = sum(rollout.num_older_tokens(version) for rollout in rollouts)
    updates = sum((version - span.version) * (span.end - span.start) for span in spans)
    oldest = min((span.version for span in spans), default=version)
    return {
        "rollout/older_tokens": older / max(num_tokens, 1),
        "rollout/mean_updates": updates / max(num_tokens, 1),
        "rollout/oldest_updates": float(version - oldest),
    }
